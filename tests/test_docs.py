"""README and docs: tables, commands, flags, links, code and quoted messages match the repository."""

import ast
import json
import re
import statistics
import textwrap
from typing import get_args, get_type_hints

import pytest
import readme
import yaml
from fit_reward_heads import FitConfig
from harness import ROOT
from label_shift import LabelShiftConfig
from preference_shift import PreferenceShiftConfig

from drdpo.cli import parse
from drdpo.config.training import METHODS, TrainConfig
from drdpo.objectives import FLAG_TO_OBJECTIVE
from drdpo.records import Preference, Prompt

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
OWN = (ROOT / "docs" / "own.md").read_text(encoding="utf-8")

SCRIPTS = {
    "setup.sh": "Assets", "generate_completions.sh": "Completions", "generate.sh": "Completions",
    "src/generate_preferences.py": "Preferences", "src/check_model.py": "CheckModel", "src/inspect_data.py": "Inspect",
    "src/show_run.py": "ShowRun", "train_alignment.sh": "Train", "src/evaluate_armorm.py": "Evaluate",
    "src/evaluate_policy.py": "EvaluatePolicy", "src/compare_openllm.py": "CompareOpenllm",
    "openllm_eval.slurm": "Leaderboard", "generate_completions.slurm": "Completions",
}  # fmt: skip
CLASSES = {script: readme.CONFIGS[f"{name}Config"] for script, name in SCRIPTS.items()}
CLASSES["experiments/fit_reward_heads.py"] = FitConfig
OTHERS = (["conda", "activate", "drdpo_env"], ["hf", "auth", "login"], ["cat", "outputs/quickstart/report.md"],
          ["bash", "quickstart.sh"], ["bash", "tests/run.sh"], ["bash", "experiments/armorm_multi_objective.sh"],
          ["bash", "experiments/openllm_leaderboard.sh"])  # fmt: skip


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_generated_tables_are_current(page):
    text = page.read_text(encoding="utf-8")
    assert readme.with_tables(text) == text, "run: python tests/readme.py"


def test_every_step_has_one_flag_table():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert sorted(readme.table_names(text)) == sorted(readme.CONFIGS)
    listed = re.findall(r"^\| `--(\w+)` \| 0\.0 \| weight of ", text, re.MULTILINE)
    assert listed == list(FLAG_TO_OBJECTIVE)


@pytest.mark.parametrize("command", readme.commands(TEXT) + readme.commands(OWN), ids=lambda words: " ".join(words)[:60])
def test_every_command_of_the_readme_and_own_md_parses(command):
    if command in OTHERS:
        assert command[0] != "bash" or (ROOT / command[1]).is_file()
        return
    program, script, *flags = command
    assert (ROOT / script).is_file() and program == ("python" if script.endswith(".py") else "bash")
    parse(CLASSES[script], "", flags)


def test_the_papers_commands_are_here_word_for_word():
    found = {" ".join(words) for words in readme.commands(TEXT)}
    sample = "bash generate_completions.sh --save_path=datasets/helpsteer2_completions --model_path=models/Llama1b"
    pair = "python src/generate_preferences.py --completions=datasets/helpsteer2_completions "
    pair += "--output_path=datasets/helpsteer2_preferences"
    train = "bash train_alignment.sh --model_path=models/Llama1b --dataset_path=datasets/helpsteer2_preferences"
    assert found >= {
        f"{sample} --best_of_n=2 --temperature=0.7", f"{sample} --best_of_n=10 --temperature=0.7", f"{pair} --ArmoRM=1.0",
        f"{pair} --ultrafeedback_truthfulness=0.5 --helpsteer_complexity=0.5",
        f"{train} --save_path=outputs/llama1b_kldpo --kldpo_tau=0.05",
        f"{train} --save_path=outputs/llama1b_wdpo --wdpo_rho=0.01",
        "bash generate.sh --only_test=true --save_path=outputs/llama1b_wdpo/global_step_316 "
        "--model_path=outputs/llama1b_wdpo/global_step_316 --best_of_n=10 --temperature=0.1",
        "bash openllm_eval.slurm --model_path=outputs/llama1b_kldpo/global_step_158",
    }  # fmt: skip


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_links_and_anchors_exist(page):
    """And the README links every page, and names the files of the top level."""
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        assert not anchor or anchor in slugs((page.parent / path).read_text(encoding="utf-8")), target
    assert page == readme.PAGES[0] or f"({page.relative_to(ROOT)})" in TEXT
    (tree,) = re.findall(r"```\n(setup\.sh .*?)```", TEXT, re.DOTALL)
    assert [name for name in re.findall(r"^(\S+)", tree, re.MULTILINE) if not (ROOT / name).exists()] == []


def test_the_citation_is_that_of_citation_cff():
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    (entry,) = re.findall(r"```bibtex\n(.*?)```", TEXT, re.DOTALL)
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert dict(re.findall(r"^  (\w+) += \{(.*)\},?$", entry.replace("{LLM}", "LLM"), re.MULTILINE)) == {
        "title": paper["title"], "author": " and ".join(names), "booktitle": paper["collection-title"],
        "year": str(paper["year"]), "eprint": paper["identifiers"][0]["value"].removeprefix("arXiv:"),
    }  # fmt: skip


def test_wdpos_accuracy_is_what_was_measured():
    errors = [pair["error"] for pair in readme.results("wdpo")["accuracy"]]
    said = f"{statistics.median(errors):.1%}", f"of {len(errors)} pairs of real text", f"{max(errors):.1%} at worst"
    for text in (TEXT, (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")):
        assert all(part in text.replace("\n", " ") for part in said), said


OTHER_FLAGS = (
    "cvar_share config help packages torch_index dev "  # ours, not of a step
    "pairs rounds cpu only_accuracy only_checkpointing longest_double_backward output steps tokens "  # of benchmarks
    "signal nodes gpus nnodes hostfile no require slurm "  # sbatch, torchrun, deepspeed, pip, experiments
    "nv bind build file tag rm ipc "  # apptainer, docker
    "python group check"  # uv, requirements/hashes.py
).split()


@pytest.mark.parametrize("page", readme.PAGES[2:], ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page):
    known = {name for each in readme.CONFIGS.values() for name in each.__dataclass_fields__}
    for study in (FitConfig, LabelShiftConfig, PreferenceShiftConfig):
        known |= {*OTHER_FLAGS, *study.__dataclass_fields__}
    assert set(re.findall(r"--([a-z]\w+)", page.read_text(encoding="utf-8"))) <= known


def test_the_code_and_rows_of_own_md_are_real():
    code, *tested = re.findall(r"```python\n(.*?)```", OWN, re.DOTALL)
    assert code.strip() in (ROOT / "experiments" / "own_method.py").read_text(encoding="utf-8")
    tests = (ROOT / "tests" / "training" / "test_own_method.py").read_text(encoding="utf-8")
    assert len(tested) == 2 and all(textwrap.dedent(each).strip() in tests for each in tested)
    (block,) = re.findall(r"```json\n(.*?)```", OWN, re.DOTALL)
    pairs = [Preference.from_trl(json.loads(line), 1) for line in block.splitlines()]
    assert len(pairs) == 3 and pairs[0] == pairs[1] == pairs[2]
    (prompt,) = re.findall(r'`(\{"prompt_id".*?\})`', OWN)
    assert Prompt.from_row(json.loads(prompt)).prompt_id == 0


def test_the_page_of_methods_has_them_all_and_its_command_parses():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    kinds = get_args(get_type_hints(TrainConfig)["loss_type"])
    assert {*re.findall(r"--method=(\w+):", text)} == set(METHODS)
    assert {*re.findall(r"--loss_type=(\w+)`", text)} | {"sigmoid"} == set(kinds)
    command, evaluated, trained = readme.commands(text)
    assert parse(TrainConfig, "", trained[2:]).eval_candidates == "outputs/base"
    assert parse(CLASSES["src/evaluate_policy.py"], "", evaluated[2:]).weights["safe"] == {"beavertails-is_safe": 1}
    parsed = parse(TrainConfig, "", command[2:])
    assert parsed.eval_groups == ["domain", "language"]
    assert parsed.mixtures["brief"] == {"helpsteer-verbosity": 0.5, "helpsteer-complexity": 0.5}


TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^ +error: (?:\.\.\. )?(.+)$", TROUBLE, re.MULTILINE)
"""The fragments that identify a message; the rest of it may change."""


def templates(source: str) -> list[str]:
    """The texts of a Python source, an f-string's values as <>."""
    nodes = list(ast.walk(ast.parse(source)))
    parts = [node.values if isinstance(node, ast.JoinedStr) else [node] for node in nodes]
    return ["".join(str(part.value) if isinstance(part, ast.Constant) else "<>" for part in group) for group in parts]


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Texts of the package, and the wrappers' lines with their variables as <>."""
    python = [text for path in (ROOT / "src").rglob("*.py") for text in templates(path.read_text(encoding="utf-8"))]
    bash = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("src/env.sh", "setup.sh"))
    return [*python, *re.sub(r"\$(\{[^}]*\}|\w+)", "<>", bash).splitlines()]


def test_every_quoted_message_is_in_the_source(sources):
    assert len(QUOTED) >= 10
    for message in QUOTED:
        assert any(re.sub(r"<\w+>", "<>", message) in text for text in sources), f"docs/troubleshooting.md: {message}"
    assert "<>: holds <> rows, not one" in templates('raise DataError(f"{path}: holds {a + b} rows, " "not one")')
