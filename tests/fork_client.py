"""Stands for `python SCRIPT ARGUMENTS` in the shell: fork_server.py runs it, with this process's environment and output.

usage: python -IS fork_client.py SOCKET SCRIPT ARGUMENTS...
"""

import json
import os
import socket
import sys

path, script, *arguments = sys.argv[1:]
task = {"script": os.path.abspath(script), "arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd()}
with socket.socket(socket.AF_UNIX) as server:
    server.connect(path)
    text = json.dumps(task).encode() + b"\n"
    # The streams go with the first byte.
    socket.send_fds(server, [text[:1]], [1, 2])
    server.sendall(text[1:])
    answer = server.recv(1)
sys.exit(answer[0] if answer else "error: the server of scripts died")
