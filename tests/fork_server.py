"""Runs scripts of the pipeline, each in a fork of a process that has imported the heavy libraries; forks.py speaks to it.

usage: fork_server.py, then one JSON object a line on stdin, each answered by one JSON value:
    {"script": FILE, "arguments": [...], "environment": {...}, "cwd": FOLDER, "out": FILE, "err": FILE}
        starts `python SCRIPT ARGUMENTS`, with this environment and no other; answers with its process id
    {"wait": process id, "seconds": s}
        answers with its exit status, minus the number of a signal that ended it, or null if it still runs after s seconds
"""

import importlib
import json
import os
import runpy
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


def run(task: dict) -> None:
    """In the child: never returns."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(task["environment"])
    os.chdir(task["cwd"])
    torch.set_num_threads(1)
    sys.argv = [task["script"], *task["arguments"]]
    sys.path[0] = str(Path(task["script"]).parent)
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
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            print(json.dumps(status_of(task["wait"], task["seconds"])), flush=True)
            continue
        child = os.fork()
        if child == 0:
            run(task)
        print(json.dumps(child), flush=True)


main()
