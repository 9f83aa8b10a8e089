"""A file per rank, save_path/logs/rank_<r>.log, of what it prints, warns and raises; the terminal stays as it is."""

import contextlib
import faulthandler
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from drdpo import distributed
from drdpo.errors import DataError, ProcessError, UsageError

FOLDER = "logs"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours and movements of the cursor."""


class RankLog:
    """Lines of this rank. They are held in memory until `keep`, so that a run that is refused writes nothing."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        self._failed = False
        self._lock = threading.RLock()

    def keep(self, folder: Path) -> None:
        """From now on append to folder/logs/rank_<r>.log, beginning with a dated line and what was said before."""
        if self._file is not None:
            return
        path = folder / FOLDER / f"rank_{distributed.rank()}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        # Line by line, so that a kill loses the line at most that was being written.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        where = f"process {os.getpid()} on {socket.gethostname()}"
        header = f"=== {now} rank {distributed.rank()} of {distributed.world_size()}, {where}"
        self._file.write(("\n" if torn else "") + header + "\n" + "".join(self._waiting))
        self._waiting.clear()
        if not faulthandler.is_enabled():
            # The stack of a crash outside Python, such as a kernel's, which no exception tells of.
            faulthandler.enable(self._file)

    def add(self, line: str) -> None:
        """One line, without its end."""
        with self._lock:
            text = f"{time.strftime('%H:%M:%S')} {line}\n"
            if self._file is None:
                self._waiting.append(text)
                return
            if self._failed:
                return
            try:
                self._file.write(text)
            except OSError as error:
                self._failed = True
                print(f"warning: {self._file.name} is not continued: {error}", file=sys.__stderr__)

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            if faulthandler.is_enabled():
                faulthandler.disable()
            self._file.close()


class _Tee:
    """A stream that goes on as it was and hands its lines to the log."""

    def __init__(self, stream: Any, log: RankLog) -> None:
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        done = self._stream.write(text)
        *lines, rest = (self._line + text).split("\n")
        for line in lines:
            self._log.add(_as_shown(line))
        # A bar that is drawn anew a thousand times is one line: what a carriage return goes back over is not kept.
        self._line = rest[rest.rfind("\r", 0, -1) + 1 :] if "\r" in rest[:-1] else rest
        return int(done if done is not None else len(text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def end(self) -> None:
        """Keep a last line without an end, such as the bar of a run that is stopped."""
        if shown := _as_shown(self._line).strip():
            self._log.add(shown)
        self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _as_shown(line: str) -> str:
    line = line.rstrip("\r")
    return _ESCAPE.sub("", line[line.rfind("\r") + 1 :])


@contextlib.contextmanager
def rank_log() -> Iterator[RankLog]:
    """Copy this process's stdout, stderr and the handlers of `logging` that write there, until the block ends.

    An exception that leaves the block is in the log with its traceback, a user's error as its one line; it goes on.
    """
    log = RankLog()
    out, err = sys.stdout, sys.stderr
    tees = {id(out): _Tee(out, log), id(err): _Tee(err, log)}
    # Libraries made their handlers when they were imported, around the streams of then.
    moved = [(handler, handler.stream) for handler in _handlers() if id(handler.stream) in tees]
    sys.stdout, sys.stderr = tees[id(out)], tees[id(err)]
    for handler, stream in moved:
        handler.setStream(tees[id(stream)])
    try:
        yield log
    except BaseException as error:
        for tee in tees.values():
            tee.end()
        for line in _told(error):
            log.add(line)
        raise
    finally:
        sys.stdout, sys.stderr = out, err
        for handler in _handlers():
            # Also those that were made meanwhile, around a tee.
            if isinstance(handler.stream, _Tee):
                handler.setStream(handler.stream._stream)
        for tee in tees.values():
            tee.end()
        log.close()


def _told(error: BaseException) -> list[str]:
    if isinstance(error, UsageError | DataError | ProcessError):
        # What the one line stands for, such as the collective that failed, is worth its traceback here.
        cause = "".join(traceback.format_exception(error.__cause__)).rstrip().split("\n") if error.__cause__ else []
        return [*cause, f"error: {error}"]
    if isinstance(error, SystemExit):
        return [f"exit: {error.code}"]
    return "".join(traceback.format_exception(error)).rstrip().split("\n")


def _handlers() -> list[Any]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler) and hasattr(handler, "stream")]
