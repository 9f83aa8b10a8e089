"""generate.sh with a stand-in for python: it evaluates what it made, and nothing after a check."""

import os
import subprocess
from pathlib import Path

import pytest


def scripts_run(root: Path, tmp_path: Path, *words: str) -> list[str]:
    binaries = tmp_path / "env" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text('#!/bin/bash\nbasename "$1"\nprintf "  %s\\n" "${@:2}"\n')
    (binaries / "python").chmod(0o755)
    environment = {**os.environ, "DRDPO_ENV": str(binaries.parent), "CUDA_VISIBLE_DEVICES": "", "DRDPO_PROCESSES": "1"}
    command = ["bash", str(root / "generate.sh"), "--save_path=out puts/x", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def names(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith(" ")]


@pytest.mark.parametrize(
    "words",
    [("--check_only=true",), ("--check_only", "True"), ("--check_only",), ("--check-only=1",), ("--check_only", "--seed=1")],
)
def test_a_check_evaluates_nothing(root: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert names(scripts_run(root, tmp_path, *words)) == ["generate_completions.py", "score_completions.py"]


@pytest.mark.parametrize(
    "words", [(), ("--check_only=false",), ("--check_only", "No"), ("--check_only=1", "--check_only=0")]
)
def test_without_a_check_it_evaluates(root: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    lines = scripts_run(root, tmp_path, *words)
    assert names(lines) == ["generate_completions.py", "score_completions.py", "evaluate_armorm.py"]
    assert lines[-3:] == ["  --runs", "  x=out puts/x", "  --output_path=out puts/x"]
