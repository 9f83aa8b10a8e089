"""Run torchrun, and end with one line and the exit status of its processes.

usage: python -P launch.py --log-dir=FOLDER TORCHRUN_ARGUMENTS... SCRIPT FLAGS...

By itself torchrun ends with status 1 and a traceback, whatever its processes ended with, and it never reports their status
after a signal that it handles. So SIGTERM and SIGUSR1 are passed on here, and torchrun only sees its processes end.
The first process prints to the terminal; each writes to FOLDER/*/attempt_0/<local rank>/{stdout,stderr}.log. If FOLDER is
/dev/null, all print to the terminal.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

STOPPED = os.EX_TEMPFAIL
"""Exit status of a process that saved its state on a signal, see drdpo.training.stop."""
SOON = 2
"""Seconds in which a rank notices under gloo that another one died; those that torchrun has to kill end later."""


def pass_on(number: int, frame: FrameType | None) -> None:
    """Signal handler: every process gets the signal. If none has started, nothing needs saving."""
    processes = psutil.Process().children()
    if not processes:
        sys.exit(STOPPED)
    for process in processes:
        process.send_signal(number)


def main() -> None:
    # Before the slow import of torch, or a signal during it would end this process with another status.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    # These end the processes. torchrun would also handle those that nohup or a shell's & made us ignore.
    ending = [each for each in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(each) != signal.SIG_IGN]
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    # torchrun starts every line with a prefix, "[default0]:" unless told otherwise; this one is the role, which is empty.
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
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        sys.exit(f"error: the processes could not be started: {reason}")


def keep_report(folder: Path) -> logging.Logger:
    """torchrun's logger, which writes to FOLDER/torchrun.log instead of the terminal."""
    report = logging.getLogger("torch.distributed")
    report.propagate = False
    report.handlers[:] = [logging.NullHandler()]
    if folder != Path(os.devnull):
        folder.mkdir(parents=True, exist_ok=True)
        report.handlers[:] = [logging.FileHandler(folder / "torchrun.log", delay=True)]
    return report


def explain(error: "ChildFailedError", folder: Path) -> int:
    """Print why the run failed, unless the process on the terminal did, and return the exit status."""
    failures = list(error.failures.values())
    # torchrun ends the other processes once the first one has ended; the state was complete before that.
    if any(failure.exitcode == STOPPED for failure in failures):
        return STOPPED
    for failure in failures:
        on_terminal = failure.local_rank == 0 or log_of(failure, folder) is None
        if on_terminal and failure.exitcode > 0 and lost(failure) is None:
            return failure.exitcode
    rank = cause(error.failures)
    failure = error.failures[rank]
    log, status = log_of(failure, folder), max(failure.exitcode, 1)
    if failure.exitcode < 0:
        what = f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}"
    else:
        last = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1] if log else ""
        what = lost(failure) or f"rank {rank} ended with status {status}: {last.removeprefix('error: ')}"
    print(f"error: {what}" + (f" (its output: {log.parent})" if log else ""), file=sys.stderr)
    return status


def cause(failures: "dict[int, ProcessFailure]") -> int:
    """The rank that failed first. One that only lost another rank does not count if a rank here failed within SOON of it."""
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    soon = [rank for rank, failure in failures.items() if failure.timestamp - first.timestamp <= SOON]
    return next((rank for rank in soon if lost(failures[rank]) is None), soon[0])


def lost(failure: "ProcessFailure") -> str | None:
    """What a rank wrote that lost another one: only drdpo.training.stop writes torchrun's error file."""
    message = failure.error_file_data["message"]
    return str(message["message"]).removeprefix("ProcessError: ") if isinstance(message, dict) else None


def log_of(failure: "ProcessFailure", folder: Path) -> Path | None:
    """The process's stderr, if it goes to a file."""
    return next(folder.glob(f"*/attempt_0/{failure.local_rank}/stderr.log"), None)


if __name__ == "__main__":
    main()
