"""The house holds: imports go down only, heavy libraries have one room each, entrypoints stay thin, files short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "drdpo"
STEPS = ("assets", "sampling", "scoring", "pairing", "training", "evaluation")
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {
    "vllm": "sampling",
    "deepspeed": "training",
    "bitsandbytes": "training",
    "triton": "kernels",
    "lm_eval": "evaluation",
    "matplotlib": "evaluation",
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.level == 0, f"{path}: relative import"
    return names


def room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part if part in (*STEPS, "kernels", "config") else "ground"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    for name in imported(path):
        words = name.split(".")
        if words[0] == "drdpo" and len(words) > 1 and words[1] in STEPS:
            assert words[1] == room(path), f"{room(path)} imports {name}; steps meet in files, the ground floor knows none"
        if words[0] in ROOMS:
            assert room(path) == ROOMS[words[0]], f"{words[0]} has its room in {ROOMS[words[0]]}"


def test_the_rule_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from drdpo.training import losses\n")
    assert "drdpo.training" in imported(bad)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600 or room(path) == "kernels"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and room(path) != "kernels":
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_runs_foreign_code(path):
    text = path.read_text(encoding="utf-8")
    assert "trust_remote_code=True" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "torch.load"), f"{path}: {name}"


def test_entrypoints_are_thin():
    for path in (ROOT / "src").glob("*.py"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert len(lines) <= 25, f"{path.name}: {len(lines)} lines"
