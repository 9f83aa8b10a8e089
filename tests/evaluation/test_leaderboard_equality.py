"""Real questions of four of the leaderboard's benchmarks through openllm_eval.slurm, against lm_eval's own command.

The harness's own task files are used as they are. Its data sets lie on the hub: folders of the same names, in the folder
where both commands run, hold a few real questions in the hub's form. MMLU-Pro's validation split, from which the five shots
come, is not in the shared data: five questions of its test split, which the test does not ask, stand for it. IFEval's
sentence splitter gets empty parameters, as the trained ones lie on the hub too; both commands use the same.
"""

import gzip
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from drdpo.chat import DATE_STRING
from drdpo.machine import resolve_dtype

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
TASKS = (
    "leaderboard_bbh_navigate", "leaderboard_bbh_snarks", "leaderboard_musr_team_allocation", "leaderboard_mmlu_pro",
    "leaderboard_ifeval",
)  # fmt: skip
QUESTIONS = 2


def write_dataset(folder: Path, splits: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """A data set as the hub's: {(configuration, split): rows}, described by the head of README.md."""
    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    for config in dict.fromkeys(config for config, _ in splits):
        lines += [f"- config_name: {config}", "  data_files:"]
        for (name, split), rows in splits.items():
            if name == config:
                file = f"{config}_{split}.jsonl"
                (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                lines += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def musr(name: str) -> list[dict[str, Any]]:
    stories = json.loads((DATA / "musr_small" / f"small_{name}.json").read_text(encoding="utf-8"))
    rows = [(story["context"], question) for story in stories for question in story["questions"]]
    rows.sort(key=lambda row: len(row[0]))
    return [
        {
            "narrative": context,
            "question": question["question"],
            "choices": repr(question["choices"]),
            "answer_index": question["answer"],
            "answer_choice": question["choices"][question["answer"]],
        }
        for context, question in rows[:1]
    ]


@pytest.fixture
def hub(tmp_path):
    """A folder with the four data sets, and NLTK's data."""
    place = tmp_path / "a place"
    bbh = {}
    for name in ("navigate", "snarks"):
        examples = json.loads((DATA / "bbh" / "bbh" / f"{name}.json").read_text(encoding="utf-8"))["examples"]
        bbh[name, "test"] = examples[:QUESTIONS]
    write_dataset(place / "SaylorTwift" / "bbh", bbh)
    write_dataset(place / "TAUR-Lab" / "MuSR", {("default", "team_allocation"): musr("team_allocation")})
    with gzip.open(DATA / "mmlu_pro" / "test_questions.jsonl.gz", "rt", encoding="utf-8") as stream:
        questions = [json.loads(next(stream)) for _ in range(QUESTIONS + 5)]
    splits = {("default", "test"): questions[:QUESTIONS], ("default", "validation"): questions[QUESTIONS:]}
    write_dataset(place / "TIGER-Lab" / "MMLU-Pro", splits)
    lines = (DATA / "ifeval" / "input_data.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    # The hub's copy has every argument in every row, null where an instruction does not take it.
    rows = [json.loads(line) for line in lines]
    names = sorted({name for row in rows for kwargs in row["kwargs"] for name in kwargs})
    for row in rows:
        row["kwargs"] = [{name: kwargs.get(name) for name in names} for kwargs in row["kwargs"]]
    write_dataset(place / "wis-k" / "instruction-following-eval", {("default", "train"): rows})
    punkt = place / "nltk" / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (punkt / name).write_text("")
    return place


def start(hub: Path, environment: dict[str, str], words: list[str]) -> subprocess.CompletedProcess[str]:
    cache = str(hub / f"cache of {words[0].rpartition('/')[2]}")
    return subprocess.run(words, capture_output=True, text=True, cwd=hub, env=environment | {"HF_HOME": cache})


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared samples of the benchmarks are not here")
def test_real_questions_equal_the_harness(smollm, hub):
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "", "NLTK_DATA": str(hub / "nltk"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ours = [
        "bash", str(ROOT / "openllm_eval.slurm"), f"--model_path={smollm}", f"--tasks={','.join(TASKS)}",
        "--max_gen_toks=16", "--max_length=2048", "--batch_size=1", "--output_path=ours",
    ]  # fmt: skip
    arguments = {
        "pretrained": str(smollm), "dtype": resolve_dtype("auto", []).dtype, "max_length": 2048,
        "chat_template_args": {"date_string": DATE_STRING},
    }  # fmt: skip
    theirs = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", json.dumps(arguments), "--tasks", ",".join(TASKS),
        "--batch_size", "1", "--device", "cpu", "--apply_chat_template", "--fewshot_as_multiturn", "--gen_kwargs",
        "max_gen_toks=16", "--output_path", "theirs.json",
    ]  # fmt: skip
    # Side by side, on one core each; with a cache each, for both write there.
    with ThreadPoolExecutor(2) as pool:
        done, direct = pool.map(lambda words: start(hub, environment, words), (ours, theirs))
    assert done.returncode == 0, done.stderr[-3000:]
    assert direct.returncode == 0, direct.stderr[-3000:]
    results = json.loads((hub / "ours" / "results.json").read_text(encoding="utf-8"))
    (stored,) = hub.rglob("theirs*.json")
    expected = json.loads(stored.read_text(encoding="utf-8"))
    for task in TASKS:
        numbers = {name: value for name, value in expected["results"][task].items() if "," in name}
        assert numbers
        for name, value in numbers.items():
            shown = None if isinstance(value, float) and math.isnan(value) else value
            assert results["results"][task][name] == shown, (task, name)
        assert results["n-samples"][task] == expected["n-samples"][task]
        asked = 1 if "musr" in task else QUESTIONS
        assert results["n-samples"][task] == {"original": asked, "effective": asked}
        assert results["n-shot"][task] == expected["n-shot"][task]
        assert task in done.stdout or "_bbh_" in task or "_musr_" in task
    manifest = json.loads((hub / "ours" / "manifest.json").read_text(encoding="utf-8"))["evaluate_openllm"]
    assert manifest["versions"]["lm-eval"]
    assert manifest["chat_template_sha256"] and manifest["date"].endswith("+00:00")
    assert manifest["task_versions"]["leaderboard_ifeval"] == 3.0
    table = (hub / "ours" / "table.md").read_text(encoding="utf-8")
    assert "| IFEval | mean of strict accuracies |" in table and "| MMLU-Pro | acc |" in table
