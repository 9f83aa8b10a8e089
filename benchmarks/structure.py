"""The shape of the source: tree, files and lines by room, import circles, and the files that one optimizer step reads.

A room is a folder of src/drdpo; the modules beside them are the ground floor. A circle is a set of modules that import each
other, also by imports inside functions or under TYPE_CHECKING. The step's files are those of src whose functions run between
the choice of the first step's pairs and the end of the optimizer step, in a real run of src/train_alignment.py on a random
model of two layers in bfloat16, together with train_alignment.sh and src/train_alignment.py. Files that launch, gather, show
and stop a step are listed apart. Triton's kernels run on CUDA only.

    PYTHONPATH=src python benchmarks/structure.py [--checkout=FOLDER] [--model=models/SmolLM2-135M] [--steps=false]

--checkout measures another clone, e.g. of an older commit, with this environment; its trainer needs the same flags and a
function of the same name for its loop. --model lends its tokenizer. --steps=false runs no training.
"""

import argparse
import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import networkx

ROOT = Path(__file__).resolve().parents[1]
STEP = ("_steps", "train_step")
"""Functions of drdpo.training.loop: the step begins with a call of the first and ends with a return of the second."""
METHODS = {"DPO": [], "WDPO": ["--wdpo_rho=0.01"]}
ENTRY = ("train_alignment.sh", "src/env.sh", "src/train_alignment.py")
AROUND = {"env.sh", "distributed.py", "progress.py", "stop.py", "preemption.py", "waiting.py", "logs.py"}
"""Files that launch a step, gather over its ranks, show it and stop it: listed apart from those that compute it."""


def modules(source: Path) -> dict[str, Path]:
    """Every module of the package drdpo below `source` by its dotted name."""
    found = {}
    for path in sorted((source / "drdpo").rglob("*.py")):
        words = path.relative_to(source).with_suffix("").parts
        found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """What a file imports, anywhere in it: (module,) of `import module`, (module, name) of `from module import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def import_graph(source: Path) -> networkx.DiGraph:
    """Which modules of drdpo import which."""
    found, graph = modules(source), networkx.DiGraph()
    for module, path in found.items():
        graph.add_node(module)
        for words in imports(ast.parse(path.read_text(encoding="utf-8"))):
            for name in (".".join(words), words[0]):  # a module of a package, or a name in a module
                if name in found:
                    graph.add_edge(module, name)
                    break
    return graph


def circles(graph: networkx.DiGraph) -> list[list[str]]:
    """Sets of modules that reach each other."""
    return sorted(sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def print_tree(source: Path) -> None:
    """Print folders, files and their lines, then a table by room."""
    rooms: dict[str, list[int]] = {}
    folder = None
    for path in sorted([*source.glob("*.py"), *source.glob("*.sh"), *(source / "drdpo").rglob("*.py")]):
        if path.parent != folder:
            folder = path.parent
            print(f"{folder.relative_to(source.parent)}/")
        words = path.relative_to(source).parts
        room = "entrypoints" if len(words) == 1 else "ground floor" if len(words) == 2 else words[1]
        rooms.setdefault(room, []).append(lines(path))
        print(f"    {path.name:28}{rooms[room][-1]:>6}")
    print(f"\n{'room':16}{'files':>8}{'lines':>8}{'longest':>9}")
    for room, counts in rooms.items():
        print(f"{room:16}{len(counts):>8}{sum(counts):>8,}{max(counts):>9}")
    every = [count for counts in rooms.values() for count in counts]
    print(f"{'src':16}{len(every):>8}{sum(every):>8,}{max(every):>9}")
    for name in ("tests", "benchmarks", "experiments"):
        counts = [lines(path) for path in (source.parent / name).rglob("*") if path.suffix in (".py", ".sh", ".cpp")]
        print(f"{name:16}{len(counts):>8}{sum(counts):>8,}{max(counts, default=0):>9}")


def make_inputs(folder: Path, tokenizer: Path) -> list[str]:
    """Write a random Llama and a few pairs; returns the flags of a run of one step on them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    known = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(known), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    known.save_pretrained(folder / "model")
    (folder / "pairs").mkdir()
    for split in ("train", "test"):
        rows: list[dict[str, Any]] = [{"prompt_id": number, "prompt": [{"role": "user", "content": f"Count to {number}."}],
                 "chosen": [{"role": "assistant", "content": "1, 2, 3"}],
                 "rejected": [{"role": "assistant", "content": "No."}]} for number in range(4)]  # fmt: skip
        (folder / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        f"--model_path={folder}/model", f"--dataset_path={folder}/pairs", f"--save_path={folder}/out",
        "--train_batch_size=4", "--micro_batch_size=2", "--max_steps=1", "--dtype=bfloat16",
    ]  # fmt: skip


def files_of_step(checkout: Path, flags: list[str]) -> list[str]:
    """Files that a step reads, by a traced run in another process.

    Raises:
        SystemExit: the run failed before the end of its first step, or has no loop of that name.
    """
    command = [sys.executable, __file__, f"--checkout={checkout}", "--trace", *flags]
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    if done.returncode or not last.startswith("["):
        raise SystemExit(f"error: no step of {checkout} could be traced:\n{done.stderr[-2000:]}")
    return [*ENTRY, *json.loads(last)]


def trace(source: Path, flags: list[str]) -> None:
    """Train until the first step's end, then print the files and end the process."""
    seen: dict[str, None] = {}

    def look(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        # Bodies of modules and classes run when they are imported; they are not optimised code.
        if code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(f"{source}/"):
            seen[os.path.relpath(code.co_filename, source.parent)] = None

    def opening(*values: Any) -> None:
        threading.settrace(look)
        sys.settrace(look)
        steps(*values)

    def closing(*values: Any) -> None:
        train_step(*values)
        print(json.dumps(list(seen)), flush=True)
        os._exit(0)

    sys.argv = [str(source / "train_alignment.py"), *flags]
    sys.path.insert(0, str(source))
    import train_alignment
    from drdpo.errors import one_line_errors
    from drdpo.training import loop

    steps, train_step = (getattr(loop, name) for name in STEP)
    for name, function in zip(STEP, (opening, closing), strict=True):
        setattr(loop, name, function)
    with one_line_errors():
        train_alignment.main()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M")
    parser.add_argument("--steps", choices=("true", "false"), default="true")
    parser.add_argument("--trace", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    source = checkout / "src"
    if options.trace is not None:
        trace(source, options.trace)
        return
    print_tree(source)
    found = circles(import_graph(source))
    print(f"\nimport circles: {len(found) or 'none'}")
    for circle in found:
        print("    " + " <-> ".join(circle))
    if options.steps == "false":
        return
    for method, flags in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            read = files_of_step(checkout, [*make_inputs(Path(folder), options.model), *flags])
        counts = {name: lines(checkout / name) for name in read}
        step = [name for name in read if Path(name).name not in AROUND]
        print(f"\nfiles of one {method} step: {len(step)}, {sum(counts[name] for name in step):,} lines")
        for name in step:
            print(f"    {name:44}{counts[name]:>6}")
        print("around it: " + ", ".join(f"{name} {counts[name]}" for name in read if name not in step))


if __name__ == "__main__":
    main()
