"""Faults that server.py plants in a script before it starts.

A fault is one of:
    {"at": "module:name", "value": v}               the name has this value
    {"at": "module:name", "returns": {...}}         the function returns an object with these attributes
    {"at": "module:name", "call": k, "when": "before" | "after", "signal": "SIGKILL"}
                                                    the process sends itself the signal at the k-th call of the function
    {"folder": F, "error": "ENOSPC", "call": k}     the k-th change of a name that begins so fails
    {"folder": F, "count": FILE, "call": k, "signal": "SIGKILL"}
                                                    ... just before the k-th change of a name in F or opening of a file there
                                                    for writing; `count` holds their number once the script has ended
"""

import errno
import importlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree", "open")


class FolderWatch:
    """An audit hook that counts the changes of a folder and sends a signal, or raises an error, at one of them."""

    def __init__(self, folder: str, count: str, call: int = 0, signal_name: str = "SIGKILL", error: str = "") -> None:
        self.folder, self.count, self.call, self.signal, self.seen = folder, count, call, signal.Signals[signal_name], 0
        self.error = error

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not isinstance(arguments[0], str | Path):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if str(arguments[0]).startswith(self.folder):
            self.seen += 1
            if self.seen == self.call and self.error:
                number = getattr(errno, self.error)
                raise OSError(number, os.strerror(number), str(arguments[0]))
            if self.seen == self.call:
                os.kill(os.getpid(), self.signal)

    def write_count(self) -> None:
        Path(self.count).write_text(str(self.seen))


def plant(faults: list[dict[str, Any]]) -> list[FolderWatch]:
    """Plant all faults in this process; returns the watches of folders."""
    watches = []
    for fault in faults:
        if "folder" in fault:
            call, sent = fault.get("call", 0), fault.get("signal", "SIGKILL")
            watch = FolderWatch(fault["folder"], fault.get("count", os.devnull), call, sent, fault.get("error", ""))
            sys.addaudithook(watch)
            watches.append(watch)
        else:
            _plant_in_module(fault)
    return watches


def _plant_in_module(fault: dict[str, Any]) -> None:
    module_name, _, path = fault["at"].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module_name)
    for part in owners:
        owner = getattr(owner, part)
    if "value" in fault:
        setattr(owner, name, fault["value"])
    elif "returns" in fault:
        setattr(owner, name, lambda *arguments: SimpleNamespace(**fault["returns"]))
    else:
        setattr(owner, name, _with_signal(getattr(owner, name), fault))


def _with_signal(function: Any, fault: dict[str, Any]) -> Any:
    calls = 0

    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == fault["call"]
        if due and fault["when"] == "before":
            os.kill(os.getpid(), signal.Signals[fault["signal"]])
        result = function(*arguments, **options)
        if due and fault["when"] == "after":
            os.kill(os.getpid(), signal.Signals[fault["signal"]])
        return result

    return faulty
