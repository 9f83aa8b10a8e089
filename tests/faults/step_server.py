"""Runs steps of the pipeline in forks of a process that has imported the heavy libraries, and strikes them as told.

usage: step_server.py, then one JSON object a line on stdin, each answered by one JSON value:
    {"script": FILE, "arguments": [...], "log": FILE, "count": FILE, "settings": {"module:name": value}, "fault": {...}}
        starts a step; answers with its process id
    {"wait": process id, "seconds": s}
        answers with its exit status (minus the number of the signal that ended it), "stopped", or "running" after s seconds
A fault is {"folder": F, "call": k, "name": of a signal, by default SIGKILL}: the step sends itself this signal just before
its k-th change of a name in F or opening of a file there for writing. `count` holds how many there were, once a step has
ended by itself.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import tensorboard  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup  # noqa: F401

NAMES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree", "open")


class Strike:
    """An audit hook that counts what changes a folder, and sends a signal at one of it."""

    def __init__(self, folder: str, call: int = 0, name: str = "SIGKILL") -> None:
        self.folder, self.call, self.signal, self.seen = folder, call, signal.Signals[name], 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in NAMES or not isinstance(arguments[0], str | Path):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if str(arguments[0]).startswith(self.folder):
            self.seen += 1
            if self.seen == self.call:
                os.kill(os.getpid(), self.signal)


def run(task: dict[str, Any]) -> None:
    """In the child: never returns."""
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(task.get("environment", {}))
    torch.set_num_threads(1)
    for place, value in task.get("settings", {}).items():
        module, _, name = place.partition(":")
        setattr(importlib.import_module(module), name, value)
    strike = Strike(**task["fault"])
    sys.addaudithook(strike)
    sys.argv = [task["script"], *task["arguments"]]
    status = 0
    try:
        runpy.run_path(task["script"], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 99
    Path(task["count"]).write_text(str(strike.seen))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def state(child: int, seconds: float) -> int | str:
    deadline = time.monotonic() + seconds
    while True:
        found, code = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if found:
            return "stopped" if os.WIFSTOPPED(code) else os.waitstatus_to_exitcode(code)
        if time.monotonic() > deadline:
            return "running"
        time.sleep(0.005)


def main() -> None:
    for module in ("training.loop", "generation.sampling", "rewards.scoring", "rewards.scorer", "evaluation.spider"):
        importlib.import_module(f"drdpo.{module}")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            print(json.dumps(state(task["wait"], task["seconds"])), flush=True)
            continue
        child = os.fork()
        if child == 0:
            run(task)
        print(json.dumps(child), flush=True)
    os._exit(0)  # at once: there is nothing to put away


main()
