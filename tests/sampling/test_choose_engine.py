"""Which engine is chosen, and how the GPUs are divided."""

import logging
import sys
import warnings

import pytest

from drdpo.errors import UsageError
from drdpo.sampling import sample, vllm_engine
from drdpo.sampling.sample import SHORT_ANSWERS, choose_engine, plan_engines


@pytest.fixture(autouse=True)
def _no_engine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRDPO_ENGINES", raising=False)


def test_vllm_that_is_missing_is_an_error_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--engine=vllm: the package vllm is not installed; .*--engine=transformers"):
        choose_engine("vllm", 1024, on_gpu=False)


def test_auto_without_vllm_is_transformers_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto", 1024, on_gpu=False) == "transformers"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("WARNING: sampling with transformers")


def test_auto_with_vllm_is_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "vllm_problem", lambda: None)
    assert choose_engine("auto", 1024, on_gpu=False) == "vllm"


def test_auto_for_short_answers_is_transformers_on_a_cpu_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_engine, "vllm_problem", lambda: None)
    assert choose_engine("auto", SHORT_ANSWERS, on_gpu=False) == "transformers"
    assert "answers of at most 64 tokens" in capsys.readouterr().out
    assert choose_engine("auto", SHORT_ANSWERS + 1, on_gpu=False) == "vllm"
    assert choose_engine("auto", SHORT_ANSWERS, on_gpu=True) == "vllm"
    assert choose_engine("vllm", SHORT_ANSWERS, on_gpu=False) == "vllm", "a flag wins"


def test_a_broken_vllm_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what an import of it then raises is an ImportError
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: object())
    problem = vllm_engine.vllm_problem()
    assert problem is not None
    assert problem.startswith("importing vllm failed: ")
    assert "\n" not in problem


def test_two_warnings_of_vllm_are_left_out_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = logging.getLogger("vllm.triton_utils.importing")
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    # Whatever vLLM, if it was imported here before, has set for its own loggers.
    monkeypatch.setattr(triton, "handlers", [handler])
    monkeypatch.setattr(triton, "level", logging.WARNING)
    monkeypatch.setattr(triton, "disabled", False)
    triton.manager._clear_cache()  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vllm_engine._silence()
        warnings.warn("`torch.distributed.reduce_op` is deprecated, please use ...", FutureWarning, stacklevel=1)
        warnings.warn("`torch.distributed.other` is deprecated", FutureWarning, stacklevel=1)
        triton.warning("Triton is installed, but doesn't include CPU backend. Disabling Triton.")
        triton.warning("Triton is installed, but something else")
    assert [str(warning.message) for warning in caught] == ["`torch.distributed.other` is deprecated"]
    assert said == ["Triton is installed, but something else"]


def test_one_engine_per_gpu() -> None:
    assert plan_engines("vllm", 1, ["0", "1", "2"]) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "012"]


def test_tensor_parallel_engines_share_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_engines("vllm", 2, ["4", "5", "GPU-a", "GPU-b", "7"]) == [
        {"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"},
    ]  # fmt: skip
    assert capsys.readouterr().out == "1 of 5 GPUs stay idle (--tensor_parallel_size)\n"


def test_one_engine_on_a_cpu_and_more_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(plan_engines("transformers", 1, [])) == 1
    monkeypatch.setenv("DRDPO_ENGINES", "2")
    assert len(plan_engines("transformers", 1, [])) == 2
    assert plan_engines("vllm", 1, ["0", "1", "2"]) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


@pytest.mark.parametrize(
    ("engine", "width", "gpus", "engines", "message"),
    [
        ("vllm", 2, [], None, "0 GPUs are visible"),
        ("vllm", 4, ["0", "1"], None, "2 GPUs are visible"),
        ("transformers", 2, ["0", "1"], None, "needs --engine=vllm"),
        ("vllm", 1, ["0"], "2", "from 1 to 1"),
        ("vllm", 1, [], "two", "at least 1"),
        ("vllm", 1, [], "0", "at least 1"),
    ],
)
def test_what_cannot_be_had_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, engine: str, width: int, gpus: list[str], engines: str | None, message: str
) -> None:
    if engines is not None:
        monkeypatch.setenv("DRDPO_ENGINES", engines)
    with pytest.raises(UsageError, match=message):
        plan_engines(engine, width, gpus)


def test_the_gpus_are_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert sample.visible_gpus() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert sample.visible_gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert sample.visible_gpus() == []
