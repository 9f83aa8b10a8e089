"""SIGKILL at random moments of every step, or a second run: nothing partial, and the same command gives the same result."""

import dataclasses
import os
import random
import signal
import time

import pytest
from harness.steps import STEPS, check_nothing_partial, contents, errors_of, finish

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("DRDPO_FAULT_KILLS", "2"))
"""Of each step; docs/reliability.md reports 20."""
_TRIES = 8


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("name", STEPS)
def test_after_sigkill_the_same_command_gives_the_same_result(name, number, forks, steps, undisturbed):
    step, whole, numbers = steps[name], undisturbed(name), random.Random(f"{name} {number}")
    for attempt in range(_TRIES):
        step.prepare()
        if number % 2:  # at a time; a step that ends before is faster than the undisturbed one, which had a busier machine
            child = step.start(forks)
            time.sleep(numbers.uniform(0.02, 0.98 * 0.7**attempt) * whole.seconds)
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
            status = child.wait()
        else:  # just before a change of a name, or an opening for writing, in the output folder
            status, _ = step.run(forks, {"call": numbers.randint(1, whole.changes)})
        if status == -9:
            break
    else:
        pytest.fail(f"{name} ended before it could be killed, {_TRIES} times")
    check_nothing_partial(step.out, whole.contents)
    finish(step, forks, whole)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_repeated_from_its_folder_alone(name, forks, steps, undisturbed):
    """With --config and no other flag, not even the folder, the same files come out, flags in manifests included."""
    whole = undisturbed(name)
    kept = whole.folder / {"sample": "sampled/manifest.json", "train": "config.json"}.get(name, "manifest.json")
    step = dataclasses.replace(steps[name], flags=(f"--config={kept}",))
    step.prepare()
    finish(step, forks, whole)


@pytest.mark.parametrize("owner_ends", ["by itself", "by SIGKILL"])
@pytest.mark.parametrize("name", STEPS)
def test_a_second_run_into_a_folder_is_refused(name, owner_ends, forks, steps, undisturbed):
    step, whole = steps[name], undisturbed(name)
    step.prepare()
    # Stopped in the middle of its writing, a run is sure to be there when the second comes.
    first = step.start(forks, {"call": max(5, whole.changes // 2), "signal": "SIGSTOP"})
    assert first.wait() == "stopped"
    status, said = step.run(forks)
    assert status == 2, said
    (error,) = errors_of(said)
    assert f"is locked by process {first.pid} on " in error
    first.send_signal(signal.SIGCONT if owner_ends == "by itself" else signal.SIGKILL)
    assert first.wait() == (0 if owner_ends == "by itself" else -9)
    if owner_ends == "by itself":
        assert contents(step.out) == whole.contents
    else:
        finish(step, forks, whole)
