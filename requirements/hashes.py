"""Write the sha256 digest of every file of every pinned release into the locks: python requirements/hashes.py [--check]

A line `name==version` of a lock says what is installed, the `--hash` lines under it which files may be. To add or to
change a package, edit its `name==version` line and run this again; the digests are read anew, for all platforms, from
the package index that uv is set up for (pip install uv; the public one unless UV_INDEX_URL says otherwise). Nothing is
downloaded. What all locks pin alike is also written into pyproject.toml. --check changes nothing and exits with status 1
where a lock lacks digests or holds others, or where `uv sync` with a group of pyproject.toml would install other versions.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent / "pyproject.toml"
LOCKS = ("cpu", "gpu", "gpu-cu12", "dev")

OTHER_INDEXES = {
    ("cpu", "torch==2.13.0"): (
        # The CPU builds 2.13.0+cpu for Python 3.11 of https://download.pytorch.org/whl/cpu, on x86-64 and on 64-bit ARM.
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
    ),
}
"""Digests of builds that the package index does not have, by lock and pin. A new version of torch needs new ones here."""

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
        subprocess.run([uv, "pip", "compile", *words, str(source), "--output-file", str(target)], cwd=folder, check=True)
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


def pins_of(name: str) -> set[str]:
    """The pins of a lock."""
    return set(header_and_pins((FOLDER / f"{name}.txt").read_text(encoding="utf-8"))[1])


def with_constraints(project: str) -> str:
    """pyproject.toml with what all locks pin alike; the groups name the rest."""
    every = set().union(*map(pins_of, LOCKS))
    versions = Counter(pin.partition("==")[0] for pin in every)
    alike = ", ".join(f'"{pin}"' for pin in sorted(every) if versions[pin.partition("==")[0]] == 1)
    lines = textwrap.fill(f"{alike},", 121, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return re.sub(r"(?<=constraint-dependencies = \[\n).*?(?=\n\])", lines, project, flags=re.DOTALL)


def leads_to(uv: str) -> dict[str, set[str]]:
    """Group -> the pins that `uv sync --group` would install; on a CPU without torch's CUDA libraries."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(PROJECT, folder)
        subprocess.run([uv, "lock", "--quiet", "--python=3.11"], cwd=folder, check=True)
        found = {}
        for name in LOCKS:
            words = f"--quiet --frozen --no-hashes --no-header --no-annotate --no-emit-project --group={name}".split()
            words += ["--group=cpu"] if name == "dev" else []
            done = subprocess.run([uv, "export", *words], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
            found[name] = {line.partition(" ")[0] for line in done.stdout.splitlines()}
    cuda = {pin for pin in pins_of("gpu") if pin.startswith(("nvidia-", "cuda-"))}
    return found | {"cpu": found["cpu"] - cuda, "dev": found["dev"] - cuda - pins_of("cpu")}


def replace(path: Path, text: str) -> None:
    """Write a file at once."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


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
            replace(path, after)
    before = PROJECT.read_text(encoding="utf-8")
    if before != (after := with_constraints(before)):
        stale.append(PROJECT.name)
        if not sys.argv[1:]:
            replace(PROJECT, after)
    print(f"{'stale' if sys.argv[1:] else 'written'}: {', '.join(stale) or 'none'}")
    if not sys.argv[1:]:
        return
    for name, pins in leads_to(uv).items():
        if apart := pins ^ pins_of(name):
            stale.append(name)
            print(f"pyproject.toml and {name}.txt differ: {' '.join(sorted(apart))}")
    if stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
