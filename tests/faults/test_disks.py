"""A full disk and a read-only folder: one line, status 1, earlier results whole; with room the same command resumes."""

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.steps import STEPS, Step, check_nothing_partial, contents, errors_of, finish

pytestmark = pytest.mark.slow


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(request: pytest.FixtureRequest, steps: dict[str, Step], undisturbed) -> Iterator[Path]:
    """A small file system of its own under a step's output folder, with what the step is given."""
    name = request.node.callspec.params["name"]
    undisturbed(name)  # before: it writes to the same folder
    out = steps[name].out
    out.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", "size=400m", "none", str(out))
    yield out
    subprocess.run(["umount", str(out)], check=True)


def refusal(status: int | str, said: str) -> str:
    """The one line of a command that ends with status 1."""
    assert status == 1, said
    assert "Traceback" not in said, said
    (error,) = errors_of(said)
    return error


UNCHECKED = {"drdpo.training.checkpoint:SLACK": -1e12}
"""Training does not find out before it writes: another program fills the disk."""


# Bytes beyond what the step is given, as a share of what it writes.
@pytest.mark.parametrize(
    ("name", "share", "settings"),
    [*((name, share, {}) for name in STEPS for share in (0.0, 0.3, 0.8)), ("train", 0.8, UNCHECKED)],
)
def test_a_full_disk_loses_nothing(name, share, settings, disk, forks, steps, undisturbed):
    step, whole = dataclasses.replace(steps[name], settings=steps[name].settings | settings), undisturbed(name)
    step.prepare(keep=True)
    files = [path for path in whole.folder.rglob("*") if path.is_file()]
    given = [path for path in disk.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in given}
    blocks = lambda paths: sum(-(-path.stat().st_size // 4096) for path in paths)  # noqa: E731
    room = blocks(given) + int(share * (blocks(files) - blocks(given)))
    # tmpfs counts no pages for empty folders; a page stays for the place of the first name.
    mount("-o", f"remount,size={max(room, 1) * 4096}", str(disk))
    error = refusal(*step.run(forks))
    assert "full" in error or "No space left" in error or "not written, as it takes" in error, error
    assert not settings or "could not be written" in error, error
    assert {path: path.read_bytes() for path in given} == before
    check_nothing_partial(disk, whole.contents)
    mount("-o", "remount,size=400m", str(disk))
    finish(step, forks, whole)


@pytest.mark.parametrize("name", STEPS)
def test_a_read_only_folder_is_refused(name, disk, forks, steps, undisturbed):
    step, whole = steps[name], undisturbed(name)
    step.prepare(keep=True)
    before = contents(disk)
    mount("-o", "remount,ro", str(disk))
    error = refusal(*step.run(forks))
    assert str(disk) in error and "Read-only file system" in error
    assert contents(disk) == before
    mount("-o", "remount,rw", str(disk))
    finish(step, forks, whole)
