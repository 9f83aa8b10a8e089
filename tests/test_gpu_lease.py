"""The script for a bare GPU machine, on this CPU: every part runs, with no library that such a machine lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MISSING = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "lm_eval", "matplotlib", "peft", "psutil", "tensorboard", "vllm",
)  # fmt: skip


@pytest.mark.slow
def test_every_part_runs_on_a_bare_machine(root: Path, tmp_path: Path) -> None:
    script, output = root / "benchmarks" / "gpu_lease.py", tmp_path / "found.json"
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({MISSING})); "
        f"sys.argv = [{str(script)!r}, '--tiny', '--output', {str(output)!r}]; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    assert '"failed"' not in json.dumps(found), found
    assert list(found)[5:] == ["new_shapes", "head", "dpo", "repeats", "wdpo", "scoring", "tests"]
    assert len(found["dpo"]) == 7 and len(found["wdpo"]) == 7
    assert all(row["s, new lengths"] > 0 for part in ("dpo", "wdpo") for row in found[part].values())
    # On a CPU sums have one order.
    assert all(row["equal"] == row["gradients"] > 0 for row in found["repeats"].values())


def test_without_a_gpu_it_says_so(root: Path, tmp_path: Path) -> None:
    script, environment = root / "benchmarks" / "gpu_lease.py", os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(root / "src")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "torch sees no GPU here; --tiny runs" in done.stderr
