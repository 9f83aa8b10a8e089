"""Run torchrun; exit with one line and the exit status of its processes.

usage: python -P launch.py --log-dir=FOLDER TORCHRUN_ARGUMENTS... SCRIPT FLAGS...

torchrun itself exits with status 1 and a traceback, whatever the status of its processes, and after a signal that it handles
it does not report their status at all. So SIGTERM and SIGUSR1 are passed on here, and torchrun only sees its processes end.
Local rank 0 prints to the terminal; each process writes to FOLDER/*/attempt_0/<local rank>/{stdout,stderr}.log. If FOLDER is
/dev/null, all print to the terminal.
"""

import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from drdpo.errors import STOPPED, one_line

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

SOON = 2
"""Seconds within which a rank under gloo notices that another died; ranks that torchrun has to kill end later."""


passed_on: set[int] = set()
"""Signals that this process has passed on."""


def pass_on(number: int, frame: FrameType | None) -> None:
    """Signal handler: pass the signal to every process. If none has started, nothing needs saving."""
    processes = psutil.Process().children()
    if not processes:
        sys.exit(STOPPED)
    passed_on.add(number)
    for process in processes:
        process.send_signal(number)


def main() -> None:
    # Before the slow import of torch: a signal during it would end this process with another status.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    # These end the processes. torchrun would also handle signals that nohup or a shell's & made this process ignore.
    ending = [each for each in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(each) != signal.SIG_IGN]
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    # torchrun starts every line with a prefix, by default "[default0]:"; this one is the role, which is empty.
    os.environ["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "${role_name}"
    handled = ",".join(each.name for each in ending)
    words = sys.argv[1:]
    script = next(place for place, word in enumerate(words) if word.endswith(".py"))
    ours = [f"--signals-to-handle={handled}", "--redirects=3", "--tee=0:3", "--role="]
    arguments = run.parse_args([*ours, *words[: script + 1]])
    # torchrun's parser would read the script's flags as abbreviations of its own: --log for --log-dir.
    arguments.training_script_args = words[script + 1 :]
    folder = Path(arguments.log_dir)
    try:
        report = keep_report(folder)
        run.run(arguments)
    except ChildFailedError as error:
        report.error("%s", error)
        sys.exit(explain(error, folder))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except (OSError, DistError, RendezvousError) as error:
        reason = one_line(str(error.__cause__ or error), 300)
        sys.exit(f"error: the processes could not be started: {reason}")


def keep_report(folder: Path) -> logging.Logger:
    """torchrun's logger, redirected from the terminal to FOLDER/torchrun.log."""
    report = logging.getLogger("torch.distributed")
    report.propagate = False
    report.handlers[:] = [logging.NullHandler()]
    if folder != Path(os.devnull):
        folder.mkdir(parents=True, exist_ok=True)
        report.handlers[:] = [logging.FileHandler(folder / "torchrun.log", delay=True)]
    return report


def explain(error: "ChildFailedError", folder: Path) -> int:
    """Print why the run failed, unless the process on the terminal already did, and return the exit status."""
    failures = list(error.failures.values())
    # torchrun ends the other processes when the first one has ended; the state was complete before that.
    # A process that a signal ended had not begun: it handles them from its first lines on, and nothing needs saving.
    if any(failure.exitcode == STOPPED or -failure.exitcode in passed_on for failure in failures):
        return STOPPED
    for failure in failures:
        log = log_of(failure, folder)
        heard = log is None or (failure.local_rank == 0 and log.stat().st_size > 0)
        if heard and failure.exitcode > 0 and lost(failure) is None:
            return failure.exitcode
    rank = cause(error.failures)
    failure = error.failures[rank]
    log, status = log_of(failure, folder), max(failure.exitcode, 1)
    if failure.exitcode < 0:
        what = f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}"
    else:
        last = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1] if log else ""
        nothing = f"it wrote nothing ({shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there)"
        what = lost(failure) or f"rank {rank} ended with status {status}: {last.removeprefix('error: ') or nothing}"
    print(f"error: {what}" + (f" (its output: {log.parent})" if log else ""), file=sys.stderr)
    return status


def cause(failures: "dict[int, ProcessFailure]") -> int:
    """The rank that failed first; not one that only lost another rank, if a rank here failed otherwise within SOON of it."""
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    soon = [rank for rank, failure in failures.items() if failure.timestamp - first.timestamp <= SOON]
    return next((rank for rank in soon if lost(failures[rank]) is None), soon[0])


def lost(failure: "ProcessFailure") -> str | None:
    """The message of a rank that lost another one: only drdpo.distributed writes torchrun's error file."""
    message = failure.error_file_data["message"]
    return str(message["message"]).removeprefix("ProcessError: ") if isinstance(message, dict) else None


def log_of(failure: "ProcessFailure", folder: Path) -> Path | None:
    """The process's stderr, if it goes to a file."""
    return next(folder.glob(f"*/attempt_0/{failure.local_rank}/stderr.log"), None)


if __name__ == "__main__":
    main()
