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
import itertools
import os
import signal
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree", "open")


def plant(faults: list[dict[str, Any]]) -> list[Callable[[], object]]:
    """Plant all faults in this process; returns what to call when the script has ended."""
    for fault in faults:
        if "at" in fault:
            module, _, path = fault["at"].partition(":")
            *owners, name = path.split(".")
            owner = reduce(getattr, owners, importlib.import_module(module))
            setattr(owner, name, fault["value"] if "value" in fault else _faulty(getattr(owner, name), fault))
    return [_watch(fault) for fault in faults if "folder" in fault]


def _watch(fault: dict[str, Any]) -> Callable[[], object]:
    """Count the changes of a folder by an audit hook, and send a signal, or raise an error, at one of them."""
    seen = 0

    def hook(event: str, words: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not isinstance(words[0], str | Path) or not str(words[0]).startswith(fault["folder"]):
            return
        if event == "open" and not words[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == fault.get("call") and "error" in fault:
            number = getattr(errno, fault["error"])
            raise OSError(number, os.strerror(number), str(words[0]))
        if seen == fault.get("call"):
            os.kill(os.getpid(), signal.Signals[fault.get("signal", "SIGKILL")])

    sys.addaudithook(hook)
    return lambda: Path(fault.get("count", os.devnull)).write_text(str(seen))


def _faulty(function: Any, fault: dict[str, Any]) -> Any:
    if "returns" in fault:
        return lambda *arguments: SimpleNamespace(**fault["returns"])
    calls = itertools.count(1)

    def faulty(*arguments: Any, **options: Any) -> Any:
        due = next(calls) == fault["call"]
        if due and fault["when"] == "before":
            os.kill(os.getpid(), signal.Signals[fault["signal"]])
        result = function(*arguments, **options)
        if due and fault["when"] == "after":
            os.kill(os.getpid(), signal.Signals[fault["signal"]])
        return result

    return faulty
