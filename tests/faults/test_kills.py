"""SIGKILL at random moments of every step: no partial file under its final name, and the same command ends with the same."""

import os
import random
import signal
import time

import pytest
from harness.steps import STEPS, check_nothing_partial, contents

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("DRDPO_FAULT_KILLS", "2"))
"""Of each step; docs/reliability.md tells of 20."""
_TRIES = 8


def killed_at_a_change(forks, step, undisturbed, numbers, latest) -> bool:
    """Just before a change of a name, or an opening for writing, in the output folder."""
    return step.run(forks, {"call": numbers.randint(1, undisturbed.changes)})[0] == -9


def killed_at_a_time(forks, step, undisturbed, numbers, latest) -> bool:
    child = step.start(forks)
    time.sleep(numbers.uniform(0.02, latest) * undisturbed.seconds)
    if child.poll() is None:
        child.send_signal(signal.SIGKILL)
        return child.wait() == -9
    return False  # it was faster than the undisturbed one, which had a busier machine


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("name", STEPS)
def test_the_same_command_ends_with_the_same_after_sigkill(name, number, forks, steps, undisturbed):
    step, whole, numbers = steps[name], undisturbed(name), random.Random(f"{name} {number}")
    kill = killed_at_a_time if number % 2 else killed_at_a_change
    for attempt in range(_TRIES):
        step.prepare()
        if kill(forks, step, whole, numbers, 0.98 * 0.7**attempt):
            break
    else:
        pytest.fail(f"{name} ended before it could be killed, {_TRIES} times")
    check_nothing_partial(step.out, whole.contents)
    status, said = step.run(forks)
    assert status == 0, said
    assert contents(step.out) == whole.contents
