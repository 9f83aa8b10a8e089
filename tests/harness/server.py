"""Runs scripts in forks of a process that has imported the heavy libraries, so that they start at once.

usage: python -m harness.server FD, the number of a listening Unix socket; ends when its stdin does.
Each connection carries one JSON line and gets one as the answer:
    {"script": FILE, "arguments": [...], "env": {...}, "cwd": FOLDER, "faults": [...]}, with stdout and stderr as descriptors
        starts `python SCRIPT ARGUMENTS` in this environment and no other, with the faults of faults.py; answers its pid
    {"poll": pid}
        answers its exit status, minus the number of a signal that ended it; "stopped", once after each stop; else null
"""

import importlib
import json
import os
import runpy
import selectors
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import tensorboard  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup  # noqa: F401

from harness.faults import plant

MODULES = ("training.loop", "sampling.sample", "scoring.score", "pairing", "evaluation.spider")


def run(task: dict[str, Any], streams: list[int]) -> None:
    """In the child, with its stdout and stderr: never returns."""
    for number, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(task["env"])
    os.chdir(task["cwd"])
    torch.set_num_threads(1)
    sys.argv = [task["script"], *task["arguments"]]
    further = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:1] = [str(Path(task["script"]).parent), *further]
    status, ends = 0, plant(task.get("faults", []))
    try:
        runpy.run_path(task["script"], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for end in ends:
        end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def state(child: int) -> int | str | None:
    found, code = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
    if not found:
        return None
    return "stopped" if os.WIFSTOPPED(code) else os.waitstatus_to_exitcode(code)


def answer(listener: socket.socket) -> None:
    """Serve one connection."""
    client, _ = listener.accept()
    with client:
        text, streams, _, _ = socket.recv_fds(client, 1, 2)
        with client.makefile("rb") as lines:
            task = json.loads(text + lines.readline())
        if "poll" in task:
            found: Any = state(task["poll"])
        else:
            found = os.fork()
            if found == 0:
                listener.close()
                client.close()
                run(task, list(streams))
        for stream in streams:
            os.close(stream)
        client.sendall(json.dumps(found).encode() + b"\n")


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.set_inheritable(False)
    for module in MODULES:
        importlib.import_module(f"drdpo.{module}")
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is sys.stdin:
                os._exit(0)  # at once: there is nothing to put away
            answer(listener)


main()
