"""A second run into the folder of a first one that is at work: refused with the owner's name; the first ends unharmed."""

import os
import signal

import pytest
from pipeline_steps import STEPS, contents, errors_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("owner_ends", ["by itself", "by SIGKILL"])
@pytest.mark.parametrize("name", STEPS)
def test_two_runs_into_one_folder(name, owner_ends, server, steps, undisturbed):
    step, whole = steps[name], undisturbed(name)
    step.prepare()
    # Stopped in the middle of its writing, a run is sure to be there when the second comes.
    first = server.start(step, {"call": max(5, whole.changes // 2), "name": "SIGSTOP"})
    assert server.wait(first) == "stopped", server.said(first)
    status, said = server.run(step)
    assert status == 2, said
    (error,) = errors_of(said)
    assert f"is locked by process {first} on " in error
    os.kill(first, signal.SIGCONT if owner_ends == "by itself" else signal.SIGKILL)
    assert server.wait(first) == (0 if owner_ends == "by itself" else -9), server.said(first)
    if owner_ends == "by SIGKILL":
        status, said = server.run(step)
        assert status == 0, said
    assert contents(step.out) == whole.contents
