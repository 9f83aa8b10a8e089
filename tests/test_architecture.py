"""The rules of the tree, by ast: imports go down, libraries have their rooms, no name stands for two things."""

import ast
import re
from collections import Counter

from structure import ROOT, STEP, circles, import_graph, imports, modules

SOURCE = ROOT / "src"
PACKAGE = SOURCE / "drdpo"
TEXTS = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in modules(SOURCE).values()}
TREES = {file: ast.parse(text) for file, text in TEXTS.items()}
STEPS = ("assets", "sampling", "scoring", "pairing", "training", "evaluation")

ROOMS = {
    "vllm": ["sampling/engines.py"], "deepspeed": ["training/engine.py", "training/checkpoint.py"],
    "bitsandbytes": ["training/"], "peft": ["training/"], "wandb": ["training/log.py"],
    "trackio": ["training/log.py"], "triton": ["kernels/"], "lm_eval": ["evaluation/leaderboard.py"],
    "matplotlib": ["evaluation/"], "huggingface_hub": ["assets/", "models.py", "training/model_card.py"],
    "filelock": ["folder.py"],
}  # fmt: skip
"""Library -> the files, or folders, that may import it."""

HAND_WRITTEN = {
    "Function": ["kernels/linear_logprob.py", "kernels/packed_attention.py", "training/patches.py", "training/passes.py"],
    "triton.jit": ["kernels/triton_layer.py", "kernels/triton_logprob.py", "kernels/triton_tangent.py"],
    "scaled_dot_product_attention": ["kernels/packed_attention.py"], "apply_chat_template": ["chat.py"],
    "ArgumentParser": ["cli.py"], "signal.signal": ["launch.py", "training/loop.py"],
    "flock": ["folder.py"],
}  # fmt: skip
"""What no library does for us -> the files that do it: backward passes, kernels, packing, chat rendering, the command line,
signals, atomic files and folders. Elsewhere a library or these files are used."""

READS_CONFIG = [f"training/{name}.py" for name in ("run", "loop", "engine", "losses", "memory")]
"""Files that may name TrainConfig: losses.py makes the method of one, memory.py chooses the flags that are left to the
machine. All others take values."""

PATCHES = {
    "training/engine.py": {"torch.utils.deterministic.fill_uninitialized_memory"},  # torch's own switch
    "sampling/engines.py": {"torch.ops._C.init_cpu_memory_env"},
}
"""Attributes of a library's modules that files other than training/patches.py may set."""


def within(file: str, places: list[str]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def set_on_libraries(tree: ast.AST) -> set[str]:
    """Attributes of imported names from outside drdpo that a file sets, as it spells them."""
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not (getattr(node, "module", None) or "").startswith("drdpo"):
            known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    found = set()
    for node in ast.walk(tree):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0], ast.unparse(node.args[1]))]
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target).split(".")[0] in known:
                found.add(ast.unparse(target))
    return found


def test_imports_go_down_only():
    for file, tree in TREES.items():
        for words in imports(tree):
            name = ".".join(words)
            assert not name.startswith("."), f"{file}: relative import of {name}"
            step = name.split(".")[1] if name.startswith("drdpo.") else None
            assert step not in STEPS or step == room(file), f"{file} imports {name}; steps meet in files"
            library = words[0].split(".")[0]
            assert library not in ROOMS or within(file, ROOMS[library]), f"{file} imports {library}, of {ROOMS[library]}"
            config = words[-1] == "TrainConfig" and room(file) != "config"
            assert not config or file in READS_CONFIG, f"{file}: take values instead of TrainConfig"


def test_what_may_be_written_by_hand():
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                used = [ast.unparse(base) for base in node.bases]
            elif isinstance(node, ast.FunctionDef):
                used = [ast.unparse(decorator) for decorator in node.decorator_list]
            else:
                used = [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
            for name in used:
                places = HAND_WRITTEN.get(name) or HAND_WRITTEN.get(name.split(".")[-1])
                assert places is None or within(file, places), f"{file}:{node.lineno} uses {name}; {places} do"


def test_the_lists_name_what_there_is():
    """A file that moved, or a function of structure.py's step that was renamed, must not leave a list without effect."""
    named = [place for places in [*ROOMS.values(), *HAND_WRITTEN.values(), READS_CONFIG, PATCHES] for place in places]
    assert [place for place in named if not (PACKAGE / place).exists()] == []
    assert set(STEP) <= {node.name for node in TREES["training/loop.py"].body if isinstance(node, ast.FunctionDef)}


def test_libraries_are_patched_in_one_file():
    for file, tree in TREES.items():
        if file != "training/patches.py":
            assert set_on_libraries(tree) == PATCHES.get(file, set()), f"{file}: patch libraries in training/patches.py"


def test_no_two_classes_share_a_name():
    names = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_files_and_functions_are_short():
    for file, tree in TREES.items():
        assert len(TEXTS[file].splitlines()) <= 600, file
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and room(file) != "kernels":
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"


def test_entrypoints_are_thin():
    for path in SOURCE.glob("*.py"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert len(lines) <= 25, f"{path.name}: {len(lines)} lines"
        # A step that cli.run_step calls by its name.
        for module, function in re.findall(r'"drdpo\.([\w.]+):(\w+)"', "\n".join(lines)):
            tree = TREES[f"{module.replace('.', '/')}.py"]
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, path.name


def test_there_are_no_import_circles_and_one_would_be_seen(tmp_path):
    assert circles(import_graph(SOURCE)) == []
    (tmp_path / "drdpo").mkdir()
    files = {"a": "import drdpo.b", "b": "def f():\n    from drdpo import c", "c": "from drdpo.a import x"}
    for name, code in files.items():
        (tmp_path / "drdpo" / f"{name}.py").write_text(code)
    assert circles(import_graph(tmp_path)) == [["drdpo.a", "drdpo.b", "drdpo.c"]]
