"""Columns of preference rows, refused or read; and test pairs by group and under other labels, in batches and in a run."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from harness.policies import config_of, with_facts
from harness.runs import flags_of, metrics_of, run_ranks, said

from drdpo import chat
from drdpo.config.training import DataSettings
from drdpo.errors import DataError
from drdpo.records import read_rows, write_rows
from drdpo.training.data import Pair, tokenise
from drdpo.training.losses import Pairs, method_of
from drdpo.training.rows import Columns, load_split
from drdpo.training.run import check_inputs, open_run
from drdpo.training.shifts import MOST_GROUPS, relabelled, shifts_of

SCORES = {"chosen_scores": {"x": 1.0, "y": 0.0}, "rejected_scores": {"x": 0.5, "y": 2.0}}
GROUP = {"method": "group:0.1", "group_column": "domain"}
PRO = {"method": "dpo_pro:0.1"}
MIXTURE = {"eval_mixture": ["safe=x:0.5,y:0.5"]}


def row(number: int, **fields) -> dict:
    texts = {"prompt": "a", "chosen": "b", "rejected": "c", "domain": "even" if number % 2 else "odd", "trust": 1.0}
    return {**texts, "chosen_score": 1.0, "rejected_score": 0.0, **SCORES, **fields}


def folder_with(path, changed: dict, split: str = "train"):
    path.mkdir(exist_ok=True)
    for name in ("train", "test"):
        rows = [row(number) for number in range(6)]
        if name == split:
            rows[2] = {key: value for key, value in {**rows[2], **changed}.items() if value is not ...}
        # NaN is what Python writes and reads; write_rows does not.
        (path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.mark.parametrize(
    ("flags", "changed", "words"),
    [
        ({"weight_column": "trust"}, {"trust": ...}, 'field "trust" is missing'),
        ({"weight_column": "trust"}, {"trust": math.nan}, 'field "trust" is no finite number'),
        ({"weight_column": "trust"}, {"trust": -0.5}, 'field "trust" is -0.5, and a weight is not negative'),
        ({"weight_column": "trust"}, {"trust": "much"}, 'field "trust" is no finite number'),
        ({"weight_column": "trust"}, {"trust": 10**400}, 'field "trust" is no finite number (of float32)'),
        (GROUP, {"domain": ...}, 'field "domain" is missing'),
        (GROUP, {"domain": ""}, 'field "domain" is missing or empty'),
        (GROUP, {"domain": 0.5}, 'field "domain" is neither a text nor a whole number'),
        (PRO, {"chosen_score": ...}, 'field "chosen_score" is missing, and the method reads it'),
        (PRO, {"rejected_score": 1e39}, 'field "rejected_score" is no finite number (of float32)'),
        (PRO, {"rejected_score": math.inf}, 'field "rejected_score": not a finite number'),
        # Test rows that cannot be evaluated apart.
        ({"eval_columns": "domain"}, {"domain": ...}, 'field "domain" is missing'),
        (MIXTURE, {"chosen_scores": ...}, 'field "chosen_scores" is missing, and --eval_mixture reads it'),
        (MIXTURE, {"rejected_scores": {"x": 1.0}}, 'field "rejected_scores" lacks y, and --eval_mixture reads it; it has x'),
        (MIXTURE, {"chosen_scores": {"x": True, "y": 1.0}}, 'field "chosen_scores": x is no finite number'),
    ],
)
def test_rows_that_cannot_be_used_are_named(flags, changed, words, made, tmp_path):
    split = "test" if any("eval" in flag for flag in flags) else "train"
    refuse(made(flags, folder_with(tmp_path / "pairs", changed, split)), f"{split}.jsonl, row 3: {words}")


@pytest.fixture
def made(tiny_policy, tmp_path):
    def make(flags: dict, data):
        paths = {"model_path": str(tiny_policy), "dataset_path": str(data), "save_path": str(tmp_path / "out")}
        config = config_of(**paths, train_batch_size=4, **flags)
        return config, method_of(config)

    return make


def refuse(made, words: str) -> None:
    with pytest.raises(DataError) as refused:
        check_inputs(*made)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not Path(made[0].save_path).exists()


def test_splits_that_cannot_be_used_are_refused(made, tmp_path):
    """One group alone, too many, two of one metric, a mixture without preferences, weights of which none counts."""
    groups, weighted, zeros = {"eval_columns": "domain"}, {"weight_column": "trust"}, [row(0, trust=0.0)] * 6
    for split, flags, rows, words in (
        ("train", GROUP, [row(0, domain="same")] * 4, 'field "domain" names one group only'),
        (
            "test",
            groups,
            [row(0, domain=str(n)) for n in range(MOST_GROUPS + 1)],
            f"names {MOST_GROUPS + 1} groups; at most {MOST_GROUPS}",
        ),
        ("test", groups, [row(0, domain="a b"), row(0, domain="a/b")], "would be the metric domain.a_b; rename one"),
        ("test", MIXTURE, [row(0, rejected_scores=SCORES["chosen_scores"])] * 2, "safe scores both answers of every pair"),
        ("train", weighted, zeros, 'train.jsonl: field "trust" is 0 in every row'),
    ):
        data = folder_with(tmp_path / "pairs", {})
        write_rows(data / f"{split}.jsonl", rows)
        refuse(made(flags, data), words)
    data = folder_with(tmp_path / "pairs", {})
    write_rows(data / "test.jsonl", zeros)  # which is evaluated without weights
    check_inputs(*made(weighted, data))


@pytest.mark.parametrize(("dropped", "words"), [(1, '"rare" is left with 1 usable'), (2, "names one group only")])
def test_a_group_that_dropped_pairs_leave_alone_is_refused(dropped, words, made, tmp_path):
    data = folder_with(tmp_path / "pairs", {})
    rows = [row(number, domain="even" if number < 4 else "rare") for number in range(6)]
    for each in rows[6 - dropped :]:
        each["rejected"] = " "
    write_rows(data / "train.jsonl", rows)
    check_inputs(*made(GROUP, data))
    with pytest.raises(DataError, match=words):
        open_run(*made(GROUP, data))


def test_columns_are_read_by_name(tmp_path):
    data = folder_with(tmp_path / "pairs", {"domain": 7})
    reads = ("trust", "chosen_tokens")
    _, columns = load_split(DataSettings(str(data)), "train", reads, ("domain",), {"safe": {"x": 0.25, "y": 0.75}}, "trust")
    # 0.25 * 1 + 0.75 * 0, and 0.25 * 0.5 + 0.75 * 2
    assert columns[1] == Columns({"trust": 1.0, "chosen_tokens": 0.0}, {"domain": "even"}, {"safe": (0.25, 1.625)})
    assert columns[2].groups == {"domain": "7"}


def test_token_counts_are_those_that_are_trained_on(tiny_policy, tmp_path):
    data = folder_with(tmp_path / "pairs", {"chosen": "one two three four"})
    tokenizer = chat.load_tokenizer(str(tiny_policy))
    preferences, columns = load_split(DataSettings(str(data)), "train", ("rejected_tokens", "chosen_tokens"))
    room = len(chat.prompt_token_ids(tokenizer, [{"role": "user", "content": "a"}]))
    pairs, _ = tokenise(preferences, tokenizer, room + 3, columns)
    found = [(pair.columns["chosen_tokens"], pair.columns["rejected_tokens"]) for pair in pairs]
    assert found == [(2, 2), (2, 2), (3, 2)] + 3 * [(2, 2)], "with the end of turn; the long answer is cut at three"


# Other labels ------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "chosen_score": torch.tensor([1.0, 1.0, 1.0]), "rejected_score": torch.zeros(3),
    "chosen_tokens": torch.tensor([3.0, 4.0, 5.0]), "rejected_tokens": torch.tensor([6.0, 7.0, 8.0]),
    "trust": torch.tensor([1.0, 2.0, 3.0]),
}  # fmt: skip
PAIRS = Pairs(torch.tensor([1.0, -2.0, 4.0]), torch.tensor([3.0, 1.0, 4.0, 2.0, 3.0, 0.0]), COLUMNS)
MIXED = torch.tensor([[5.0, 7.0], [3.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
"""The first pair's answers change places, the third has no preference."""


def test_relabelled_pairs_are_those_of_a_data_set_with_the_other_labels():
    other = relabelled(PAIRS, MIXED)
    assert other.margins_B.tolist() == [-1, -2, 4]
    assert other.log_ratios_S.tolist() == [2, 1, 4, 3, 3, 0]
    assert torch.equal(other.margins_B, other.log_ratios_S[:3] - other.log_ratios_S[3:])
    assert other.columns["chosen_score"].tolist() == [7, 3, 1] and other.columns["rejected_score"].tolist() == [5, 2, 1]
    assert other.columns["chosen_tokens"].tolist() == [6, 4, 5] and other.columns["rejected_tokens"].tolist() == [3, 7, 8]
    assert other.columns["trust"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("flags", [{}, {"loss_type": "sigmoid_norm"}, PRO, {"method": "holder:2"}])
def test_metrics_of_groups_and_mixtures_by_hand(flags):
    loss = method_of(config_of(**flags)).loss
    facts = [Columns({}, {"domain": name}, {"m": tuple(scores)}) for name, scores in zip("aba", MIXED.tolist(), strict=True)]
    shifts, lines = shifts_of(facts, ["domain"], ["m"], "pairs")
    assert lines == ["domain.a: 2 pairs", "domain.b: 1 pairs",
                     "m: 1 of 3 labels differ from the data set's, 1 without a preference"]  # fmt: skip
    # Two batches in another order, the second with padding.
    order, tables = torch.tensor([2, 0, 1, -1]), []
    for indices in order.split(2):
        rows = torch.where(indices < 0, 0, indices)
        part = Pairs(PAIRS.margins_B[rows], PAIRS.log_ratios_S.view(2, 3)[:, rows].flatten(),
                     {name: column[rows] for name, column in COLUMNS.items()})  # fmt: skip
        tables.append(torch.cat([torch.stack([loss(part), (part.margins_B > 0).float()], dim=1),
                                 shifts.table(loss, part, indices)], dim=1))  # fmt: skip
    table = torch.cat(tables)[:3]
    found = shifts.metrics(order[:3], table[:, :2], table[:, 2:])
    plain, other = loss(PAIRS).tolist(), loss(relabelled(PAIRS, MIXED)).tolist()
    assert found == pytest.approx({
        "loss.domain.a": (plain[0] + plain[2]) / 2, "accuracy.domain.a": 1.0, "loss.domain.b": plain[1],
        "accuracy.domain.b": 0.0, "loss.m": (other[0] + other[1]) / 2, "accuracy.m": 0.0,
    }, rel=1e-6)  # fmt: skip


def test_without_shifts_nothing_is_added():
    shifts, lines = shifts_of(with_facts([Pair([1], [2], [3])]), [], [], "pairs")
    assert lines == [] and shifts.table(lambda pairs: pairs.margins_B, PAIRS, torch.arange(3)).shape == (3, 0)
    assert shifts.metrics(torch.arange(3), torch.zeros(3, 2), torch.zeros(3, 0)) == {}


@pytest.mark.slow
def test_a_run_reports_shifted_populations(forks, tiny_policy, data, tmp_path):
    """On two ranks; the mixture's figures are those of a run whose test pairs have these labels from the start."""
    words = {"max_epochs": 1, "save_resume": False, "train_batch_size": 4, "method": "cvar:0.5"}
    runs = {"shifted": (data, {"eval_columns": "domain", "eval_mixture": "other=y:1"}), "labelled": (tmp_path / "other", {})}
    (tmp_path / "other").mkdir()
    for split in ("train", "test"):
        rows = [each for _, each in read_rows(data / f"{split}.jsonl")]
        for each in rows if split == "test" else ():
            if each["chosen_scores"]["y"] < each["rejected_scores"]["y"]:
                each["chosen"], each["rejected"] = each["rejected"], each["chosen"]
        write_rows(tmp_path / "other" / f"{split}.jsonl", rows)
    last = []
    for name, (folder, more) in runs.items():
        save, log = tmp_path / name, tmp_path / f"log {name}"
        assert run_ranks(forks, flags_of(tiny_policy, folder, save, **words, **more), log) == [0, 0], said(log)
        last.append(metrics_of(save)[-1])
    shifted, labelled = last
    assert shifted["eval_loss.other"] == pytest.approx(labelled["eval_loss"], rel=1e-6)
    assert shifted["eval_accuracy.other"] == pytest.approx(labelled["eval_accuracy"])
    assert shifted["eval_loss"] != pytest.approx(labelled["eval_loss"], rel=1e-3)
    # Of three test pairs the first and the last are in one group.
    of_groups = (2 * shifted["eval_loss.domain.even"] + shifted["eval_loss.domain.odd"]) / 3
    assert shifted["eval_loss"] == pytest.approx(of_groups)
    assert "test, other: 2 of 3 labels differ" in said(tmp_path / "log shifted")
    # Pair by pair, from both ranks and in the test pairs' order: the means are the metrics.
    found = json.loads((tmp_path / "shifted" / "eval_pairs.json").read_text())
    margins = [one - other for one, other in zip(found["chosen_reward"], found["rejected_reward"], strict=True)]
    assert found["prompt_id"] == [0, 1, 2] and statistics.mean(found["loss"]) == pytest.approx(shifted["eval_loss"])
    assert statistics.mean(margins) == pytest.approx(shifted["eval_margin"], abs=1e-6)
    assert found["loss"] == pytest.approx([math.log1p(math.exp(-margin)) for margin in margins], rel=1e-5)
    events = (tmp_path / "shifted" / "tensorboard").iterdir()
    assert any(b"eval/loss.domain.even" in path.read_bytes() for path in events)
