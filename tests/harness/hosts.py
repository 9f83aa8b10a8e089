"""Two hosts, each a network namespace with an address of its own and a server of forks, as fixtures of a module."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from harness.forks import Forks

FIRST = "10.97.5.1"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network() -> Iterator[list[tuple[str, str]]]:
    """[(namespace, interface)] of two hosts on one cable."""
    names = [f"drdpo{os.getpid()}{letter}" for letter in "ab"]
    interfaces = [f"d{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", interfaces[0], "netns", names[0], "type", "veth", "peer", "name", interfaces[1], "netns", names[1])
        for number, (name, interface) in enumerate(zip(names, interfaces, strict=True), start=1):
            ip("-n", name, "addr", "add", f"10.97.5.{number}/24", "dev", interface)
            for device in ("lo", interface):
                ip("-n", name, "link", "set", device, "up")
            # A sender learns from the kernel that nobody answers: after three tries, instead of a quarter of an hour.
            ip("netns", "exec", name, "sh", "-c", "echo 3 >/proc/sys/net/ipv4/tcp_retries2")
        yield list(zip(names, interfaces, strict=True))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def hosts(network, tmp_path_factory) -> Iterator[list[Forks]]:
    hosts = [Forks(tmp_path_factory.mktemp("host"), *place) for place in network]
    for host in hosts:
        host.start_server()  # both at once
    yield hosts
    for host in hosts:
        host.close()
