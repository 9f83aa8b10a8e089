"""Runs train_alignment on ranks that are forks of one process with the heavy libraries imported: a machine of a cluster.

usage: rank_server.py, then one JSON object a line on stdin:
    {"ranks": [0, 1], "world": 2, "address": ..., "port": ..., "flags": {...}, "log": FILE, "faults": [...]}
starts these ranks and answers with a JSON list of their exit statuses, minus the number of a signal that ended one.
A rank's output goes to <log>.<rank>. A fault is {"rank": r, "at": "module:function", "when": "before" | "after", "call": k,
"signal": name}: the rank sends itself this signal at the k-th call of the function; or {"at": "shutil:disk_usage", "when":
"replace", ...}: the rank believes that the disk is empty.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import deepspeed  # noqa: F401
import tensorboard  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup  # noqa: F401

from drdpo.config import TrainConfig
from drdpo.errors import one_line_errors


def plant(fault: dict) -> None:
    """Have the k-th call of a function send a signal."""
    module_name, _, path = fault["at"].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module_name)
    for part in owners:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), []
    if fault["when"] == "replace":
        setattr(owner, name, lambda *arguments: SimpleNamespace(total=1e15, free=1e15))
        return

    def strike() -> None:
        if len(calls) == fault["call"]:
            os.kill(os.getpid(), signal.Signals[fault["signal"]])

    def faulty(*arguments, **options):
        calls.append(None)
        if fault["when"] == "before":
            strike()
        result = function(*arguments, **options)
        if fault["when"] == "after":
            strike()
        return result

    setattr(owner, name, faulty)


def run(task: dict, rank: int) -> None:
    """In the child: never returns."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(task["ranks"].index(rank)), WORLD_SIZE=str(task["world"]),
        MASTER_ADDR=task["address"], MASTER_PORT=str(task["port"]), **task.get("environment", {}),
    )  # fmt: skip
    log = os.open(f"{task['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    status = 0
    try:
        from drdpo.training.loop import train_alignment
        from drdpo.training.run import check_inputs

        for fault in task.get("faults", []):
            if fault["rank"] == rank:
                plant(fault)
        with one_line_errors():
            config = TrainConfig(**task["flags"])
            check_inputs(config)
            train_alignment(config)
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    importlib.import_module("drdpo.training.loop")
    print("ready", flush=True)
    for line in sys.stdin:
        task, children = json.loads(line), []
        Path(task["log"]).parent.mkdir(parents=True, exist_ok=True)
        for rank in task["ranks"]:
            child = os.fork()
            if child == 0:
                run(task, rank)
            children.append(child)
        ended = {}
        while len(ended) < len(children):
            child, code = os.waitpid(-1, os.WUNTRACED)
            if os.WIFSTOPPED(code):
                # A rank that hangs: its peers notice; then it is for the server to end it.
                others = [other for other in children if other != child]
                for other in others:
                    ended[other] = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
                os.kill(child, signal.SIGKILL)
                code = os.waitpid(child, 0)[1]
            ended[child] = os.waitstatus_to_exitcode(code)
        print(json.dumps([ended[child] for child in children]), flush=True)
    os._exit(0)  # at once: there is nothing to put away


main()
