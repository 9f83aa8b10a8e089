"""benchmarks/: the check of the quickstart's claim, and the script for a bare GPU machine on this CPU."""

import json
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import quickstart


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/quickstart.py on a machine of bfloat16 and 100 GFLOP/s."""
    monkeypatch.setattr(quickstart, "dtype_here", lambda: "bfloat16")
    monkeypatch.setattr(quickstart, "speed", lambda dtype: 100.0)
    monkeypatch.setattr(quickstart, "gpus", lambda: False)
    return quickstart


def gains(**low: float) -> dict[str, Any]:
    found = {method: {"value": 0.5, "low": value, "high": 0.9} for method, value in low.items()}
    return {
        "weights": {"a": 1.0}, "gains_sd": found, "flags": "--a=1", "seconds": {"train": 240, "sample": 60}, "peak_gib": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(("low", "status"), [(0.1, 0), (0.0, "error: no gain for sure: wdpo, seed 8")])
def test_an_interval_that_is_not_above_zero_fails(check, monkeypatch, tmp_path, low, status):
    output = tmp_path / "results.json"
    stored = {"3": gains(dpo=0.1), "4": gains(dpo=0.1) | {"flags": "--a=2"}}
    output.write_text(json.dumps({"avx2": {"dtype": "float32"}, "native": {"seeds": stored}}))
    monkeypatch.setattr(check, "run", lambda seed, *_: gains(dpo=0.2, wdpo=low if seed == 8 else 0.2))
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--seeds", "7", "8", f"--output={output}"])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == status
    written = json.loads(output.read_text())
    assert written["avx2"] == {"dtype": "float32"}, "another kind of CPU stays"
    assert written["native"]["seconds"] == 300 and set(written["native"]["seeds"]) == {"3", "7", "8"}, "of the same flags"


def test_the_estimate_scales_what_was_measured_in_the_same_precision(check):
    entry = {"machine": "2 cores", "dtype": "bfloat16", "gflops": 200.0, "seconds": 600.0}
    other = entry | {"dtype": "float32", "seconds": 9000.0}
    line = check.estimate({"avx2": other, "native": entry})
    # Half the speed: of ten minutes, five of them matrix products, fifteen.
    assert "15 minutes" in line
    assert "not been measured" in check.estimate({"avx2": other})


MISSING = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "lm_eval", "matplotlib", "peft", "psutil", "tensorboard", "vllm",
)  # fmt: skip


@pytest.mark.slow
def test_every_part_of_the_lease_runs_on_a_bare_machine(root, tmp_path):
    script, output = root / "benchmarks" / "gpu_lease.py", tmp_path / "found.json"
    refused = subprocess.run([sys.executable, script], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    assert refused.returncode == 2 and b"torch sees no GPU" in refused.stderr
    code = f"""if True:
        import runpy, sys
        sys.modules.update(dict.fromkeys({MISSING}))
        sys.argv = [{str(script)!r}, "--tiny", "--output", {str(output)!r}]
        runpy.run_path({str(script)!r}, run_name="__main__")"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(root / name) for name in ("src", "benchmarks"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    assert '"failed"' not in json.dumps(found), found
    assert list(found)[5:] == ["tests", "new_shapes", "head", "dpo", "repeats", "wdpo", "scoring"]
    assert len(found["dpo"]) == 7 and len(found["wdpo"]) == 3
    assert all(row["s, new lengths"] > 0 for part in ("dpo", "wdpo") for row in found[part].values())
    # On a CPU sums have one order.
    assert all(row["equal"] == row["gradients"] > 0 for row in found["repeats"].values())
