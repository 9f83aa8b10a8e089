"""Talks to server.py. As a program it replaces `python SCRIPT ARGUMENTS` in a shell: the script runs in a fork there.

usage: python -IS client.py SOCKET SCRIPT ARGUMENTS...
"""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

POLL_SECONDS = 0.01


def ask(place: str, task: dict[str, Any], streams: Sequence[int] = ()) -> Any:
    """The server's answer to one task; `streams` are the stdout and stderr of a script to start."""
    text = json.dumps(task).encode() + b"\n"
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        if streams:
            socket.send_fds(server, [text[:1]], list(streams))
            text = text[1:]
        server.sendall(text)
        with server.makefile("rb") as answers:
            answer = answers.readline()
    if not answer:
        raise ConnectionError("the server of forks died")
    return json.loads(answer)


def main() -> None:
    place, script, *arguments = sys.argv[1:]
    task = {"script": os.path.abspath(script), "arguments": arguments, "env": dict(os.environ), "cwd": os.getcwd()}
    child = ask(place, task, [1, 2])
    status = None
    while not isinstance(status, int):
        time.sleep(POLL_SECONDS)
        status = ask(place, {"poll": child})
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
