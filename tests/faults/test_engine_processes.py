"""An engine process that dies in the middle of sampling: one line, finished blocks kept, the same command resumes."""

import json
import os
import signal
import sys
import time

import psutil
import pytest

from drdpo.records import Completion, Prompt, read_records, write_records

pytestmark = pytest.mark.slow


ALL = pytest.mark.skipif("DRDPO_FAULT_KILLS" not in os.environ, reason="DRDPO_FAULT_KILLS=20 asks for all faults")


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=ALL)])
def test_a_dead_engine_process_in_the_middle_of_sampling(engine, root, forks, vllm_policy, tmp_path):
    prompts = [Prompt(row, [{"role": "user", "content": f"Count to {row}."}]) for row in range(8)]
    write_records(tmp_path / "prompts" / "test.jsonl", prompts)
    part = tmp_path / "out" / "sampled" / ".test.parts" / "0.0.jsonl"
    command = [
        sys.executable, str(root / "src" / "generate_completions.py"), f"--save_path={tmp_path / 'out'}", "--only_test=true",
        f"--model_path={vllm_policy}", f"--dataset={tmp_path / 'prompts'}", "--best_of_n=128", "--temperature=1.0",
        "--max_new_tokens=4", f"--engine={engine}", "--dtype=float32",
    ]  # fmt: skip
    environment = {**os.environ, "DRDPO_ENGINES": "2", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    run = forks.start(command, environment)
    deadline = time.monotonic() + 300
    while not (part.is_file() and part.read_bytes().count(b"\n") >= 1):
        assert run.poll() is None and time.monotonic() < deadline, run.said()
        time.sleep(0.02)
    # What multiprocessing has spawned, without its resource tracker.
    workers = [child for child in psutil.Process(run.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    status, output = run.wait(timeout=120), "".join(run.said())
    assert status == 1, output
    assert "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "engine process 1 of 2 died" in error and "signal 9" in error
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    kept = {line["part"]: line["content"] for line in lines}
    assert 0 < len(kept) < len(prompts)
    # With one engine now: how many there are changes no sample.
    again = forks.run(command, {**environment, "DRDPO_ENGINES": "1"})
    assert again.returncode == 0, again.stderr
    assert f"{128 * len(kept)} of {128 * len(prompts)} completions" in again.stdout
    found: dict[str, list[list[int]]] = {}
    for row in read_records(tmp_path / "out" / "sampled" / "test.jsonl", Completion.from_row):
        found.setdefault(str(row.prompt_id), []).append(row.token_ids)
    assert [len(samples) for samples in found.values()] == [128] * len(prompts)
    for samples in kept.values():
        for prompt, of_prompt in samples.items():
            assert found[prompt] == [token_ids for token_ids, _ in of_prompt]
