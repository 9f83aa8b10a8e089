"""Runs commands of the pipeline one after the other, each in a fork of a process that has imported the heavy libraries once.

usage: fork_server.py, then one JSON object a line on stdin: {"script": ..., "arguments": [...], "out": FILE, "err": FILE};
answers with the exit status, a line each. The script runs as __main__, as `python SCRIPT ARGUMENTS` would.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import deepspeed  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup  # noqa: F401


def run(task: dict) -> None:
    """In the child: never returns."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
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


print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
