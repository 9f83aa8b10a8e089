"""README and docs: tables match the flags, commands parse, links and anchors exist, the citation is that of CITATION.cff."""

import re
from pathlib import Path

import pytest
import readme
import yaml

from drdpo import config
from drdpo.cli import parse
from drdpo.objectives import FLAG_TO_OBJECTIVE

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

SCRIPTS = {
    "setup.sh": config.AssetsConfig,
    "generate_completions.sh": config.CompletionsConfig,
    "generate.sh": config.CompletionsConfig,
    "src/generate_preferences.py": config.PreferencesConfig,
    "src/inspect_data.py": config.InspectConfig,
    "src/show_run.py": config.ShowRunConfig,
    "train_alignment.sh": config.TrainConfig,
    "src/evaluate_armorm.py": config.EvaluateConfig,
    "src/compare_openllm.py": config.CompareOpenllmConfig,
    "openllm_eval.slurm": config.LeaderboardConfig,
}
OTHERS = (["conda", "activate", "drdpo_env"], ["hf", "auth", "login"], ["cat", "outputs/quickstart/report.md"],
          ["bash", "quickstart.sh"], ["bash", "tests/run.sh"], ["bash", "experiments/armorm_multi_objective.sh"],
          ["bash", "experiments/openllm_leaderboard.sh"])  # fmt: skip


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_generated_tables_are_current(page):
    text = page.read_text(encoding="utf-8")
    assert readme.with_tables(text) == text, "run: python tests/readme.py"


def test_every_step_has_one_flag_table():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert sorted(readme.table_names(text)) == sorted(config.__all__)
    listed = re.findall(r"^\| `--(\w+)` \| 0\.0 \| weight of ", text, re.MULTILINE)
    assert listed == list(FLAG_TO_OBJECTIVE)


@pytest.mark.parametrize("command", readme.commands(TEXT), ids=lambda words: " ".join(words)[:60])
def test_every_command_parses(command, root):
    if command in OTHERS:
        assert command[0] != "bash" or (root / command[1]).is_file()
        return
    program, script, *flags = command
    assert (program, script) in {("python" if s.endswith(".py") else "bash", s) for s in SCRIPTS}, command
    assert (root / script).is_file()
    parse(SCRIPTS[script], "", flags)


def test_the_papers_commands_are_here_word_for_word():
    found = [" ".join(words) for words in readme.commands(TEXT)]
    for words in (
        "bash generate_completions.sh --save_path=datasets/helpsteer2_completions --model_path=models/Llama1b --best_of_n=2 "
        "--temperature=0.7",
        "bash generate_completions.sh --save_path=datasets/helpsteer2_completions --model_path=models/Llama1b "
        "--best_of_n=10 --temperature=0.7",
        "python src/generate_preferences.py --completions=datasets/helpsteer2_completions "
        "--output_path=datasets/helpsteer2_preferences --ultrafeedback_truthfulness=0.5 --helpsteer_complexity=0.5",
        "python src/generate_preferences.py --completions=datasets/helpsteer2_completions "
        "--output_path=datasets/helpsteer2_preferences --ArmoRM=1.0",
        "bash train_alignment.sh --model_path=models/Llama1b --dataset_path=datasets/helpsteer2_preferences "
        "--save_path=outputs/llama1b_kldpo --kldpo_tau=0.05",
        "bash train_alignment.sh --model_path=models/Llama1b --dataset_path=datasets/helpsteer2_preferences "
        "--save_path=outputs/llama1b_wdpo --wdpo_rho=0.01",
        "bash generate.sh --only_test=true --save_path=outputs/llama1b_wdpo/global_step_316 "
        "--model_path=outputs/llama1b_wdpo/global_step_316 --best_of_n=10 --temperature=0.1",
        "bash openllm_eval.slurm --model_path=outputs/llama1b_kldpo/global_step_158",
    ):
        assert words in found


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_links_and_anchors_exist(page):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        assert not anchor or anchor in slugs((page.parent / path).read_text(encoding="utf-8")), target


def test_the_readme_links_every_page():
    for page in readme.PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in TEXT


def test_the_top_level_of_the_file_tree_exists():
    (tree,) = re.findall(r"```\n(setup\.sh .*?)```", TEXT, re.DOTALL)
    names = re.findall(r"^(\S+)", tree, re.MULTILINE)
    assert len(names) >= 10
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_citation_is_that_of_citation_cff():
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    (entry,) = re.findall(r"```bibtex\n(.*?)```", TEXT, re.DOTALL)
    fields = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", entry, re.MULTILINE))
    assert fields["title"].replace("{", "").replace("}", "") == paper["title"]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert fields["author"] == " and ".join(names)
    assert (fields["booktitle"], int(fields["year"])) == (paper["collection-title"], paper["year"])
    assert paper["identifiers"][0]["value"] == f"arXiv:{fields['eprint']}"
