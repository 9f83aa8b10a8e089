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

import pytest
import yaml

from drdpo.chat import DATE_STRING
from drdpo.machine import resolve_dtype
from drdpo.records import write_rows

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
TASKS = (
    "leaderboard_bbh_navigate", "leaderboard_bbh_snarks", "leaderboard_musr_team_allocation", "leaderboard_mmlu_pro",
    "leaderboard_ifeval",
)  # fmt: skip
QUESTIONS = 2


def write_dataset(folder, splits):
    """A data set as the hub's: {(configuration, split): rows}, described by the head of README.md."""
    configs = {}
    for (config, split), rows in splits.items():
        write_rows(folder / f"{config}_{split}.jsonl", rows)
        configs.setdefault(config, []).append({"split": split, "path": f"{config}_{split}.jsonl"})
    head = yaml.safe_dump({"configs": [{"config_name": name, "data_files": files} for name, files in configs.items()]})
    (folder / "README.md").write_text(f"---\n{head}---\n", encoding="utf-8")


def musr(name):
    """The question about the shortest story."""
    stories = json.loads((DATA / "musr_small" / f"small_{name}.json").read_text(encoding="utf-8"))
    story = min(stories, key=lambda story: len(story["context"]))
    asked = story["questions"][0]
    return {
        "narrative": story["context"], "question": asked["question"], "choices": repr(asked["choices"]),
        "answer_index": asked["answer"], "answer_choice": asked["choices"][asked["answer"]],
    }  # fmt: skip


@pytest.fixture
def hub(tmp_path):
    """A folder with the four data sets, and NLTK's data."""
    place, bbh = tmp_path / "a place", {}
    for name in ("navigate", "snarks"):
        examples = json.loads((DATA / "bbh" / "bbh" / f"{name}.json").read_text(encoding="utf-8"))["examples"]
        bbh[name, "test"] = examples[:QUESTIONS]
    write_dataset(place / "SaylorTwift" / "bbh", bbh)
    write_dataset(place / "TAUR-Lab" / "MuSR", {("default", "team_allocation"): [musr("team_allocation")]})
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


def start(hub, words):
    environment = os.environ | {
        "HF_HOME": str(hub / f"cache of {words[0].rpartition('/')[2]}"), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "NLTK_DATA": str(hub / "nltk"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(words, capture_output=True, text=True, cwd=hub, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared samples of the benchmarks are not here")
def test_real_questions_equal_the_harness(smollm, hub):
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
        done, direct = pool.map(lambda words: start(hub, words), (ours, theirs))
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
    assert manifest["versions"]["lm-eval"] and manifest["task_versions"]["leaderboard_ifeval"] == 3.0
    assert manifest["chat_template_sha256"] and manifest["date"].endswith("+00:00")
