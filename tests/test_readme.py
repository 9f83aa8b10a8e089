"""The README tells the truth: its tables are the flags, its commands parse, its links and pictures exist."""

import re
from pathlib import Path

import pytest
import readme

from drdpo import config
from drdpo.cli import parse
from drdpo.objectives import FLAG_TO_OBJECTIVE

TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")

SCRIPTS = {
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
OTHERS = (["conda", "activate", "drdpo_env"], ["hf", "auth", "login"], ["bash", "setup.sh"], ["bash", "quickstart.sh"],
          ["bash", "tests/run.sh"], ["bash", "experiments/armorm_multi_objective.sh"],
          ["bash", "experiments/openllm_leaderboard.sh"])  # fmt: skip


def test_flag_tables_are_those_of_the_config_classes():
    assert readme.with_tables(TEXT) == TEXT, "run: python tests/readme.py"
    assert sorted(readme.table_names(TEXT)) == sorted(config.__all__), "one table a step"


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


def test_supported_objectives_are_listed_by_their_flags():
    section = TEXT.split("**Supported objectives**")[1].split("###")[0]
    listed = [name for line in section.splitlines() if line.startswith(("*", "  ")) for name in re.findall(r"`(\w+)`", line)]
    assert listed == list(FLAG_TO_OBJECTIVE)


def test_local_links_exist(root):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT):
        assert (root / target).exists(), target
