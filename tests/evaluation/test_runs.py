"""Answers that repeat themselves, and what the manifests of other steps record about a run."""

import json

import pytest

from drdpo.cli import as_dict
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.evaluation.runs import read_provenance, repeated_share
from drdpo.folder import write_manifest


def test_repeated_share_by_hand():
    # abcd abcd: 5 four-grams (abcd bcda cdab dabc abcd), 4 distinct.
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([7] * 13) == pytest.approx(9 / 10)
    assert repeated_share([1, 2, 3]) == 0.0
    assert repeated_share([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)


def test_nothing_recorded(tmp_path):
    found = read_provenance(tmp_path, "test")
    assert (found.policy, found.method, found.made_by) == ("not recorded", "no training recorded", {})
    assert len(found.notes) == 2


def test_a_real_manifest(tmp_path):
    training = TrainConfig(model_path="m", dataset_path="d", save_path="s", wdpo_rho=0.01, seed=5)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(as_dict(training)))
    write_manifest(run, "train", {"method": "WDPO (wdpo_rho=0.01)"})
    (tmp_path / "sampled").mkdir()
    made_by = {"model": "f00d", "temperature": 0.7, "top_k": None}
    write_manifest(tmp_path / "sampled", "sample_test", made_by, {}, model_path=str(run / "global_step_9"))
    found = read_provenance(tmp_path, "test")
    assert found.policy.endswith("global_step_9")
    assert found.method == "WDPO (wdpo_rho=0.01), beta=0.01, seed=5"
    assert found.made_by == {"sampling": {"temperature": "0.7"}}
    # The train split was not sampled.
    assert read_provenance(tmp_path, "train").made_by == {}


def test_a_models_folder_is_no_training(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "run" / "sampled").mkdir(parents=True)
    write_manifest(tmp_path / "run" / "sampled", "sample_test", {}, model_path=str(tmp_path / "model"))
    found = read_provenance(tmp_path / "run", "test")
    assert (found.policy, found.method) == (str(tmp_path / "model"), "no training recorded")


def test_a_broken_manifest_is_an_error(tmp_path):
    (tmp_path / "manifest.json").write_text('{"score_test": ')
    with pytest.raises(DataError, match="not JSON"):
        read_provenance(tmp_path, "test")
