"""An engine process that dies in the middle of sampling: one line, finished blocks kept, the same command ends the work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow


def workers_of(pid: int) -> list[psutil.Process]:
    """Engine processes: what multiprocessing has spawned, without its resource tracker."""
    children = psutil.Process(pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture
def policy(tiny_policy: Path, tmp_path: Path) -> Path:
    """A random Llama whose heads are as wide as vLLM's attention on a CPU wants them."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    settings = AutoConfig.from_pretrained(tiny_policy)
    settings.hidden_size, settings.num_attention_heads, settings.num_key_value_heads, settings.head_dim = 64, 2, 1, 32
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


ALL = pytest.mark.skipif("DRDPO_FAULT_KILLS" not in os.environ, reason="DRDPO_FAULT_KILLS=20 asks for all faults")


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=ALL)])
def test_a_dead_engine_process_in_the_middle_of_sampling(engine, root, policy, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    rows = [{"prompt_id": row, "prompt": [{"role": "user", "content": f"Count to {row}."}]} for row in range(8)]
    (prompts / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = tmp_path / "out" / "sampled" / ".test.part.jsonl"
    command = [
        sys.executable, str(root / "src" / "generate_completions.py"), f"--save_path={tmp_path / 'out'}", "--only_test=true",
        f"--model_path={policy}", f"--dataset={prompts}", "--best_of_n=128", "--temperature=1.0",
        "--max_new_tokens=4", f"--engine={engine}", "--dtype=float32",
    ]  # fmt: skip
    environment = {**os.environ, "DRDPO_ENGINES": "2", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        deadline = time.monotonic() + 300
        while not (part.is_file() and part.read_bytes().count(b"\n") >= 2):
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.02)
        workers = workers_of(run.pid)
        assert len(workers) == 2
        workers[0].send_signal(signal.SIGKILL)
        status = run.wait(timeout=120)
    output = (tmp_path / "said").read_text()
    assert status == 1, output
    assert "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "engine process 1 of 2 died (killed by signal 9" in error and "the same command goes on from there" in error
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    kept = {line["block"]: line["samples"] for line in lines[1:]}
    assert 0 < len(kept) < len(rows)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"{128 * len(kept)} of {128 * len(rows)} completions are there from a run that was broken off" in again.stdout
    found: dict[int, list[list[int]]] = {}
    for line in (Path(part.parent) / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["prompt_id"], []).append(row["token_ids"])
    assert {prompt: len(samples) for prompt, samples in found.items()} == dict.fromkeys(range(len(rows)), 128)
    for samples in kept.values():
        for prompt, of_prompt in samples.items():
            assert found[int(prompt)] == [token_ids for token_ids, _ in of_prompt]
