"""The GPU path without a GPU: our code on fake CUDA tensors (benchmarks/fake_cuda.py), run by fake_cuda_worker.py."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """What every run of the worker told, by name."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "DS_ACCELERATOR")}
    environment["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root / "benchmarks")])
    words = [sys.executable, root / "tests" / "fake_cuda_worker.py"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1200)
    if "ImportError: fake CUDA: " in done.stderr and "does not compile" not in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


def of(runs, word):
    """The runs whose names hold this word; there must be some."""
    found = {name: run for name, run in runs.items() if word in name.split()}
    assert found, word
    return found


def test_every_run_ends_but_that_with_a_tensor_on_the_wrong_device(runs):
    assert {name: run["where"] for name, run in runs.items() if "error" in run and "planted" not in name} == {}
    assert len(runs) > 40 and "cuda:0 and cpu" in runs["planted"]["error"]
    assert "its table as `blocks`" in runs["planted launch"]["error"]


def test_no_step_of_packed_rows_waits_for_the_device(runs):
    for name, run in runs.items():
        if "syncs" in run and not {"padded", "scoring", "checks"} & set(name.split()):
            assert run["syncs"] == run["on_cpu"] == {}, name


def test_the_attention_of_packed_rows(runs):
    """One call a layer by default, never a kernel that makes a plan for every length, nor one with whole matrices."""
    for method in ("dpo", "kldpo", "drdpo"):
        passes = 1 if method == "dpo" else 2  # the survey of the population is the other
        assert runs[f"{method} bfloat16 auto"]["attention"] == {}
        assert runs[f"{method} bfloat16 auto"]["varlen"] == passes
    assert runs["scoring"]["varlen"] == 1 and runs["scoring"]["attention"] == {}
    for name, run in runs.items():
        if "attention" in run and "padded" not in name:
            assert {kind.split()[0] for kind in run["attention"]} <= {"flash", "efficient"}, name
    for name, run in of(runs, "sdpa").items():
        if "memory" not in name:
            # The tangent pass of WDPO has its own kernels.
            assert bool(run["attention"]) == (not name.startswith("wdpo")) and not run["varlen"], name


def test_the_precision_of_products(runs):
    """float32 multiplies in float32 throughout, and bfloat16 never: WDPO's values are two bfloat16 numbers each."""
    for dtype in ("float32", "bfloat16"):
        for name, run in of(runs, dtype).items():
            assert set(run["flops"]) == {dtype, "triton"}, name


def test_adapters_and_recomputation_cost_what_they_should(runs):
    plain, recomputed, lora = (runs[f"dpo {name}"] for name in ("bfloat16 auto", "recomputed", "bfloat16 lora"))
    assert recomputed["varlen"] == 2 * plain["varlen"]
    # A third of the products, those of the weights' gradients, are not needed; forward passes are a third.
    assert lora["flops"]["bfloat16"] < 0.75 * plain["flops"]["bfloat16"] < plain["flops"]["bfloat16"]
    assert plain["flops"]["bfloat16"] < recomputed["flops"]["bfloat16"] < 1.34 * plain["flops"]["bfloat16"]


def test_a_default_step_of_llama_1b(runs, root):
    """The committed counts are those of today's code, and within what a GPU is kept busy by."""
    rows = json.loads((root / "benchmarks" / "results" / "gpu_counts.json").read_text(encoding="utf-8"))["rows"]
    default = ("Llama-3.2-1B", "dpo", True)
    committed = {row["pairs"]: row for row in rows if (row["model"], row["method"], row["default"]) == default}
    for pairs in (1, 16):
        counted = {key: runs[f"counts {pairs}"].get(key) for key in committed[pairs]}
        assert counted == committed[pairs], "run: PYTHONPATH=src python benchmarks/gpu_counts.py"
    assert committed[16]["launches"] <= 4500 and committed[16]["gib_moved"] <= 380
    assert committed[1]["launches"] <= 2500


def test_memory_is_predicted(runs):
    asked = {name: run for name, run in runs.items() if "predicted" in run}
    assert len(asked) == 6
    for name, run in asked.items():
        assert run["predicted"] == pytest.approx(run["counted"], rel=0.1), name
