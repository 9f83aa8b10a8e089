"""inspect_data and show_run on fabricated folders: numbers by hand, shared prompts, rejected rows, runs; errors."""

import json
import os
import sys

import pytest

from drdpo.config.evaluation import InspectConfig, ShowRunConfig
from drdpo.errors import DataError
from drdpo.evaluation.inspection import inspect_data
from drdpo.evaluation.show_run import _curves, read_metrics, show_run
from drdpo.folder import lock_folder, write_manifest
from drdpo.records import write_rows


def user(text):
    return [{"role": "user", "content": text}]


def completion(prompt_id, sample_id, answer, tokens, score, **more):
    row = {
        "prompt_id": prompt_id, "sample_id": sample_id, "prompt": user(f"question {prompt_id}"),
        "completion": [{"role": "assistant", "content": answer}], "token_ids": [7] * tokens, "finish_reason": "stop",
    }  # fmt: skip
    return row | ({} if score is None else {"scores": {"helpsteer-coherence": score}}) | more


COMPLETION_ROWS = [
    completion(1, 0, "an answer", 1, 1.0),
    completion(1, 1, "another", 2, 2.0, finish_reason="length"),
    completion(2, 0, "", 3, 3.0, prompt=[{"role": "system", "content": "be brief"}, *user("question 2")]),
    completion(3, 0, "c", 14, 6.0),
]


def look(path, capsys, **flags):
    inspect_data(InspectConfig(str(path), **flags))
    return capsys.readouterr().out


def cells(printed, name):
    (line,) = [line for line in printed.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


def test_completions_by_hand(tmp_path, capsys):
    write_rows(tmp_path / "sampled" / "train.jsonl", COMPLETION_ROWS)
    write_rows(tmp_path / "sampled" / "test.jsonl", [completion(9, 0, "x", 5, None)])
    printed = look(tmp_path, capsys)
    assert "train.jsonl: 4 completions" in printed and "test.jsonl: 1 completions" in printed
    assert "3 distinct prompts; rows of each, min / median / max: 1 / 1 / 2" in printed
    assert "25.0% have a system message or several turns" in printed
    assert "finish_reason: stop 3, length 1" in printed and "empty answers: 1" in printed
    # Of 1 2 3 6: mean 3, sd sqrt(14 / 3), p10 0.3 of the way from 1 to 2, p90 0.7 from 3 to 6, p99 0.97 from 3 to 6.
    assert cells(printed, "score helpsteer-coherence") == ["3.0", "2.1602", "1.0", "1.3", "2.5", "5.1", "5.91", "6.0"]
    assert printed.count("--- train.jsonl, row ") == 3 and printed.count("--- test.jsonl, row ") == 1
    assert printed == look(tmp_path, capsys), "the same seed, the same rows"
    assert "--- " not in look(tmp_path, capsys, samples=0)


def said(text):
    return [{"role": "assistant", "content": text}]


def test_pairs_by_hand_in_trls_forms_too(tmp_path, capsys):
    rows = [
        {"prompt_id": 1, "prompt": user("q"), "chosen": said("aaaa"), "rejected": said("b"),
         "chosen_score": 2.0, "rejected_score": 1.0},
        {"prompt": "r", "chosen": "same", "rejected": "same ", "chosen_score": 0.0, "rejected_score": 2.0},
        {"chosen": [*user("s"), *said("x")], "rejected": [*user("s"), *said("yy")]},
    ]  # fmt: skip
    write_rows(tmp_path / "train.jsonl", rows)
    printed = look(tmp_path / "train.jsonl", capsys)
    assert "3 preference pairs" in printed and "chosen is longer in 33.3% of the pairs (in characters)" in printed
    assert "equal texts: 1" in printed and "chosen scored lower: 1" in printed
    assert float(cells(printed, "score margin")[0]) == -0.5
    # Pairs that training drops.
    answers = [("a", "b"), ("", "b"), ("a", " \n"), ("", "")]
    write_rows(tmp_path / "train.jsonl", ({"prompt": "x", "chosen": one, "rejected": other} for one, other in answers))
    assert "empty answers: 3 (such pairs are not trained on)" in look(tmp_path / "train.jsonl", capsys, samples=0)


def test_shared_prompts_and_rejected_rows(tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", [{"prompt_id": 1, "prompt": user("a  b")}, {"prompt_id": 2, "prompt": user("c")}])
    write_rows(tmp_path / "test.jsonl", [{"prompt_id": 7, "prompt": user("a b")}])
    write_rows(tmp_path / "rejects.jsonl", [{"file": "x", "row": 3, "reason": "too\x1b[31m long"}] * 2)
    printed = look(tmp_path, capsys)
    assert "note: train.jsonl and test.jsonl share 1 prompts" in printed
    assert "2  too\\x1b[31m long" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": 1}], "row 1: a row of unknown kind; its fields are question"),
        ([COMPLETION_ROWS[0], {"prompt_id": 4, "prompt": user("x")}], "row 2: rows of two kinds"),
        ([COMPLETION_ROWS[0] | {"finish_reason": "tired"}], "row 1: field .*finish_reason"),
    ],
)
def test_bad_rows_are_named(rows, message, tmp_path):
    with pytest.raises(DataError, match="no JSON-lines file"):
        inspect_data(InspectConfig(str(tmp_path)))
    write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=message):
        inspect_data(InspectConfig(str(tmp_path)))


@pytest.fixture
def folder(tmp_path):
    """A KLDPO run of 8 pairs a step, killed in its third line, after two steps of 4 s, of ten."""
    run, made_by = tmp_path / "a run", {"train_batch_size": 8, "method": "KLDPO (kldpo_tau=0.05)"}
    write_manifest(run, "train", made_by, steps=10, complete=False)
    rows = [
        {"step": 1, "loss": 0.7, "accuracy": 0.5, "pairs_per_second": 2.0, "effective_sample_size": 8},
        {"step": 2, "loss": 0.6, "accuracy": 1, "pairs_per_second": 2.0, "eval_loss": 0.65},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    for state, name in (("step_2", "state.json"), ("step_3", "part")):
        (run / "resume" / state).mkdir(parents=True)
        (run / "resume" / state / name).write_text("{}")
    return run


def shown(folder, capsys, picture=False):
    show_run(ShowRunConfig(str(folder), picture))
    return capsys.readouterr().out


def test_a_dead_run(folder, root, forks):
    """By the command. 8 of 10 steps are left, of 4 s each."""
    text = forks.run([sys.executable, root / "src" / "show_run.py", folder, "--picture=false"]).stdout
    for fragment in ("stopped; rerun the same command to resume after step 2", "step 2 of 10 (20%)",
                     "KLDPO (kldpo_tau=0.05)", "4.0 s a step", "32.0 s, without", "eval_loss 0.65 at step 2"):  # fmt: skip
        assert fragment in text
    assert not (folder / "training.png").exists()


def test_a_running_one_has_an_owner(folder, capsys):
    with lock_folder(folder):
        assert f"running: process {os.getpid()} on " in shown(folder, capsys)
    assert "stopped" in shown(folder, capsys), "its owner has gone"


def test_shifted_test_pairs_have_panels_of_their_own(folder):
    row = {"step": 3, "loss": 0.5, "eval_loss": 0.6, "eval_loss.domain.a": 0.7, "eval_loss.other": 0.8}
    row |= {"eval_accuracy.other": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    axes = {part.get_title(): part for part in _curves(read_metrics(folder / "metrics.jsonl"), "a run").axes}
    shown = {title: [line.get_label() for line in part.lines] for title, part in axes.items()}
    assert shown["loss"] == ["loss", "eval_loss"]
    assert shown["loss, shifted test pairs"] == ["eval_loss.domain.a", "eval_loss.other"]
    assert shown["accuracy, shifted test pairs"] == ["eval_accuracy.other"]


def test_a_finished_one_and_its_picture(folder, capsys):
    write_manifest(folder, "train", {"train_batch_size": 8, "method": "DPO"}, steps=2, complete=True)
    before = {path.name for path in folder.iterdir()}
    text = shown(folder, capsys, picture=True)
    assert "training, finished" in text and "step 2 of 2 (100%)" in text and "DPO" in text
    assert {path.name for path in folder.iterdir()} == before | {"training.png"}
    assert (folder / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_steps_that_were_logged_twice_count_once(folder):
    whole = (folder / "metrics.jsonl").read_text().splitlines()[:2]
    (folder / "metrics.jsonl").write_text("\n".join([*whole, '{"step": 2, "loss": 0.5, "lr": "x"}']) + "\n")
    table = read_metrics(folder / "metrics.jsonl")
    assert table.index.tolist() == [1, 2]
    assert table["loss"].tolist() == [0.7, 0.5] and table["lr"].isna().all()


def test_damaged_files_cause_no_traceback(folder, capsys):
    whole = (folder / "metrics.jsonl").read_text().splitlines()[0]
    for line in ('{"step": "x"}', '{"step": null}', '{"step": 1e400}', '{"step": true}', '{"loss": 1}'):
        (folder / "metrics.jsonl").write_text(f"{whole}\n{line}\n")
        assert "step 1 of 10" in shown(folder, capsys)
    for record in ([1], {"made_by": [], "steps": "8"}, {"made_by": {"train_batch_size": "many"}, "steps": -1}):
        (folder / "manifest.json").write_text(json.dumps({"train": record}))
        assert "step 1" in shown(folder, capsys)


def test_folders_of_other_steps_and_none(tmp_path, capsys):
    for name, says in (("x", "no such folder"), (".", "pass the output folder of a step")):
        with pytest.raises(DataError, match=says):
            show_run(ShowRunConfig(str(tmp_path / name)))
    write_manifest(tmp_path, "score_train", {}, counts={"in": 4, "out": 3})
    text = shown(tmp_path, capsys)
    assert "output of score_train" in text and "'in': 4, 'out': 3" in text
