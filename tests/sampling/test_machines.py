"""Step 1 on two hosts that share a folder: what one machine gives, byte for byte, also after one of them is lost."""

import json
import os
import subprocess
import sys

import pytest
from harness.forks import free_port, statuses, without_ranks
from harness.hosts import FIRST
from harness.reward_models import write_embedded_like
from harness.stand_ins import add_program
from sampling.conftest import write_prompts

from drdpo.distributed import Machines, machines
from drdpo.errors import UsageError

FILES = ("sampled/test.jsonl", "sampled/train.jsonl", "sampled/rejects.jsonl", "test.jsonl", "train.jsonl", "rejects.jsonl")


@pytest.mark.parametrize(
    ("nodes", "node", "expected"),
    [
        (None, None, (1, None)), ("", "", (1, None)), ("1", "0", (1, None)), ("2", None, (2, None)), ("2", "1", (2, 1)),
        ("2", "2", None), ("0", None, None), ("two", None, None), ("2", "-1", None), ("2", "x", None),
    ],
)  # fmt: skip
def test_the_machines_are_read_from_the_environment(nodes, node, expected, monkeypatch):
    for name, value in (("DRDPO_NODES", nodes), ("DRDPO_NODE_RANK", node), ("DRDPO_WRITE", None)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(UsageError, match=f"DRDPO_NODES={nodes} and DRDPO_NODE_RANK={node} must be"):
            machines()
    else:
        assert machines() == Machines(*expected)


KEPT = without_ranks() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def words(smollm, tiny_policy, tmp_path_factory):
    """Flags of both scripts but for --save_path: five blocks of test prompts, two of train prompts."""
    room = tmp_path_factory.mktemp("room")
    reward_model = write_embedded_like(room / "reward model", smollm, ["kind", "right"], shards=1)
    return [
        f"--model_path={tiny_policy}", f"--dataset={write_prompts(room)}", f"--reward_model={reward_model}",
        "--best_of_n=64", "--temperature=1.0", "--max_new_tokens=4", "--prompt_max_len=42", "--engine=transformers",
        "--dtype=float32", "--score_max_len=64", "--score_batch_tokens=400",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def start(root, hosts, words):
    """Start sampling on a host: as one of two machines, as the process that divides and writes, or alone."""

    def sample(save, nodes=2, node=None, faults=(), **variables):
        ours = {"DRDPO_NODES": str(nodes), **variables} | ({} if node is None else {"DRDPO_NODE_RANK": str(node)})
        command = [sys.executable, root / "src" / "generate_completions.py", *words, f"--save_path={save}"]
        return hosts[node or 0].start(command, KEPT | ours, faults=faults)

    return sample


@pytest.fixture(scope="module")
def score(root, hosts, words):
    """Start scoring on so many hosts."""

    def ranks(save, world, faults=()):
        command = [sys.executable, root / "src" / "score_completions.py", *words, f"--save_path={save}"]
        places = {"address": FIRST, "port": free_port(), "log": save.parent / "score", "faults": faults}
        return [hosts[rank].start_ranks(command, world, ranks=[rank], **places)[0] for rank in range(world)]

    return ranks


@pytest.fixture(scope="module")
def alone(start, score, tmp_path_factory):
    """The files of one machine."""
    save = tmp_path_factory.mktemp("alone") / "out"
    assert statuses([start(save, nodes=1)]) == [0]
    assert statuses(score(save, 1)) == [0]
    return {name: (save / name).read_bytes() for name in FILES}


@pytest.mark.slow
def test_a_host_that_is_lost_costs_its_unfinished_blocks(start, score, alone, tmp_path):
    save = tmp_path / "out"
    early = start(save, node=1)
    assert early.wait() == 2
    assert "the blocks of test are not divided among 2 machines; run the same command once with" in early.said()[1]

    def divide():
        fork = start(save)
        assert fork.wait() == 0, fork.said()
        return [line.partition(" left")[0] for line in fork.said()[0].splitlines() if " left for 2 machines" in line]

    assert sorted(divide()) == ["2 of 2 blocks of train are", "5 of 5 blocks of test are"]
    # The second host has two blocks of test, then one of train.
    lost = {"at": "drdpo.folder:Parts.add", "call": 1, "when": "after", "signal": "SIGKILL"}
    assert statuses([start(save, node=0), start(save, node=1, faults=[lost])]) == [0, -9]
    assert (save / "sampled" / ".lock.1").exists() and not (save / "sampled" / "test.jsonl").exists()
    # The last round of a job, where a block is missing or a shared folder does not show it yet.
    write = start(save, DRDPO_WRITE="true")
    assert write.wait() == 1 and "1 of 5 blocks of test are missing" in write.said()[1], write.said()
    assert sorted(divide()) == ["1 of 2 blocks of train are", "1 of 5 blocks of test are"]
    again = [start(save, node=0), start(save, node=1)]
    assert statuses(again) == [0, 0], [fork.said() for fork in again]
    assert ["loading" in fork.said()[0] for fork in again] == [True, False], "one block a split, for the first"
    assert divide() == []
    assert {path.name for path in (save / "sampled").iterdir()} == {
        "manifest.json", "rejects.jsonl", "test.jsonl", "train.jsonl",
    }  # fmt: skip

    dead = {"at": "drdpo.scoring.score:Scorer.score", "call": 3, "when": "after", "signal": "SIGKILL", "rank": 1}
    ranks = score(save, 2, [dead])
    assert statuses(ranks) == [1, -9]
    assert "error: rank 0 lost another rank" in ranks[0].said()[0] and "Traceback" not in ranks[0].said()[0]
    assert not (save / "test.jsonl").exists()
    assert statuses(score(save, 2)) == [0, 0]
    assert {name: (save / name).read_bytes() for name in FILES} == alone


@pytest.mark.slow
def test_the_job_on_two_hosts_gives_the_files_of_one_machine(root, network, hosts, words, alone, tmp_path):
    """generate_completions.slurm with stand-ins for srun and scontrol; the scores come from torchrun's real ranks."""
    places = [hosts[node].environment(tmp_path / f"host{node}") for node in range(2)]
    for name in ("srun", "scontrol"):
        add_program(places[0] / "bin", name, f"slurm/{name}")
    job = {
        "DRDPO_PROCESSES": "1", "DRDPO_ENV": str(places[0]), "LAUNCHED": str(tmp_path / "launched"), "MASTER_ADDR": FIRST,
        "SLURM_JOB_ID": "40007", "SLURM_JOB_NUM_NODES": "2",
    }  # fmt: skip
    for node, ((namespace, interface), place) in enumerate(zip(network, places, strict=True)):
        path = f"PATH={place / 'bin'}:{os.environ['PATH']}"
        job[f"SRUN_ON_{node}"] = f"ip netns exec {namespace} env GLOO_SOCKET_IFNAME={interface} DRDPO_ENV={place} {path}"
    save = tmp_path / "out"
    command = ["bash", str(root / "generate_completions.slurm"), *words, f"--save_path={save}"]
    done = subprocess.run(command, env=KEPT | job, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: (save / name).read_bytes() for name in FILES} == alone
    assert json.loads((save / "manifest.json").read_text())["score_test"]["processes"] == 2
