"""Runs scripts of the pipeline, each in a fork of a process that has imported the heavy libraries; forks.py speaks to it.

usage: fork_server.py SOCKET, then one JSON object a line on stdin, each answered by one JSON value:
    {"script": FILE, "arguments": [...], "environment": {...}, "cwd": FOLDER, "out": FILE, "err": FILE}
        starts `python SCRIPT ARGUMENTS`, with this environment and no other; answers with its process id
    {"wait": process id, "seconds": s}
        answers with its exit status, minus the number of a signal that ended it, or null if it still runs after s seconds
It listens at SOCKET too, for fork_client.py, which stands for a script in the shell: it sends such a task, without "out" and
"err", and with its own stdout and stderr, and ends with the status that it is sent.
"""

import importlib
import json
import os
import runpy
import selectors
import socket
import sys
import time
import traceback
from pathlib import Path

import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup  # noqa: F401

MODULES = (
    "training.loop", "generation.sampling", "rewards.scoring", "rewards.scorer", "rewards.pairing", "evaluation.spider",
)  # fmt: skip


def run(task: dict, streams: list[int]) -> None:
    """In the child, with its stdout and stderr: never returns."""
    for number, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(task["environment"])
    os.chdir(task["cwd"])
    torch.set_num_threads(1)
    sys.argv = [task["script"], *task["arguments"]]
    further = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:1] = [str(Path(task["script"]).parent), *further]
    status = 0
    try:
        runpy.run_path(task["script"], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def written(name: str) -> int:
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def serve(client: socket.socket) -> None:
    """In a child: run what fork_client.py asks for, and tell it the status; never returns."""
    text, streams, _, _ = socket.recv_fds(client, 1, 2)
    with client.makefile("rb") as stream:
        task = json.loads(text + stream.readline())
    child = os.fork()
    if child == 0:
        client.close()
        run(task, list(streams))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    client.sendall(bytes([status if status >= 0 else 128 - status]))
    os._exit(0)


def status_of(child: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        found, code = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(code)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


def main() -> None:
    for module in MODULES:
        importlib.import_module(f"drdpo.{module}")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    served: list[int] = []
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    # Without a buffer, of which the selector would not know.
    orders = os.fdopen(os.dup(0), "rb", buffering=0)
    waiting.register(orders, selectors.EVENT_READ)
    print(json.dumps("ready"), flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                child = os.fork()
                if child == 0:
                    serve(client)
                client.close()
                served = [pid for pid in [*served, child] if os.waitpid(pid, os.WNOHANG)[0] == 0]
                continue
            line = orders.readline()
            if not line:
                os._exit(0)  # at once: there is nothing to put away
            obey(json.loads(line))


def obey(task: dict) -> None:
    """A line of stdin."""
    if "wait" in task:
        print(json.dumps(status_of(task["wait"], task["seconds"])), flush=True)
        return
    child = os.fork()
    if child == 0:
        run(task, [written(task["out"]), written(task["err"])])
    print(json.dumps(child), flush=True)


main()
