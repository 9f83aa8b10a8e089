"""openllm_eval.slurm: flags, tasks and data; the wrapper with stand-ins; marked slow, lm-eval itself on a small model."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets.exceptions
import pytest
import yaml
from harness.forks import RANK_VARIABLES, Forks, statuses
from harness.stand_ins import add_program, make_environment

from drdpo.chat import DATE_STRING
from drdpo.cli import parse
from drdpo.config.evaluation import LeaderboardConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation import leaderboard
from drdpo.evaluation.leaderboard import evaluate_openllm, find_tasks, output_folder
from drdpo.evaluation.leaderboard_scores import HUB_BENCHMARKS, json_safe
from drdpo.folder import changed, lock_folder

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["."], do_sample: false, max_gen_toks: 30}}
filter_list: [{{name: first_word, filter: [{{function: regex, regex_pattern: "([A-Za-z]+)"}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, ignore_case: true}}]
"""
GROUP = "group: tiny\ntask: [tiny_choice, tiny_generation]\naggregate_metric_list: [{metric: acc}, {metric: exact_match}]\n"
ROWS = [
    ("Which animal barks? Answer with one word.", ["Dog", "Cat"], 0),
    ("Which one is a colour? Answer with one word.", ["Seven", "Blue", "Run"], 1),
    ("Which one is a fruit? Answer with one word.", ["Apple", "Chair", "Stone", "River"], 0),
    ("Which city is the capital of France? Answer with one word.", ["Berlin", "Rome", "Paris"], 2),
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of two small tasks and their group."""
    folder = tmp_path / "my tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    rows = [{"question": question, "choices": choices, "label": label} for question, choices, label in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(data=json.dumps(str(data))))
    (folder / "generation.yaml").write_text(GENERATION.format(data=json.dumps(str(data))))
    (folder / "group.yaml").write_text(GROUP)
    return folder


def test_tasks_are_found_in_both_places(tasks: Path) -> None:
    names = ["tiny", "leaderboard_musr"]
    index = find_tasks([*names, "leaderboard"], str(tasks), {}).task_index
    assert [*index["tiny"].cfg["task"], *index["leaderboard_musr"].cfg["task"]] == [
        "tiny_choice", "tiny_generation", "leaderboard_musr_murder_mysteries", "leaderboard_musr_object_placements",
        "leaderboard_musr_team_allocation",
    ]  # fmt: skip


def test_a_group_that_lists_itself_is_named(tiny_policy: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no task nowhere (or )?in"):
        find_tasks(["tiny", "nowhere"], str(tasks), {})
    (tasks / "group.yaml").write_text("group: tiny\ntask:\n  - tiny\n  - tiny_choice\n")
    with pytest.raises(DataError, match="task tiny could not be loaded"):
        evaluate_openllm(tiny_config(tiny_policy, tasks, tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"tasks": "tiny,tiny"}, "names a task twice"),
        ({"tasks": " ,"}, "names no task"),
        ({"include_path": "nowhere"}, "--include_path=nowhere: no such folder"),
    ],
)
def test_usage_errors(tiny_policy: Path, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        evaluate_openllm(LeaderboardConfig(model_path=str(tiny_policy), check_only=True, **flags))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"limit": 0}, "must be positive"),
        ({"limit": 2.5}, "whole number"),
        ({"batch_size": "many"}, "--batch_size=many"),
        ({"max_length": 0}, "--max_length=0"),
        ({"tensor_parallel_size": 2}, "requires --backend=vllm"),
        ({"apply_chat_template": False}, "--fewshot_as_multiturn=false"),
    ],
)
def test_refused_flags(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        LeaderboardConfig(model_path="m", **flags)


def test_vllm_of_another_name_is_refused(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise leaderboard.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(leaderboard.metadata, "version", version)
    with pytest.raises(UsageError, match="--backend=hf"):
        evaluate_openllm(LeaderboardConfig(model_path=str(tiny_policy), backend="vllm", check_only=True))


def test_processes_without_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UsageError, match="data-parallel over GPUs only"):
        leaderboard._parallelism(LeaderboardConfig(model_path="m"))


@pytest.mark.parametrize(
    ("gpus", "span", "ray", "engines"),
    [(8, 2, True, 4), (1, 1, False, 1), (0, 1, False, 1), (2, 2, False, 1), (8, 3, True, 0), (4, 1, False, 0)],
)
def test_vllm_engines(monkeypatch: pytest.MonkeyPatch, gpus: int, span: int, ray: bool, engines: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(leaderboard, "find_spec", lambda name: ray if name == "ray" else None)
    config = LeaderboardConfig(model_path="m", backend="vllm", tensor_parallel_size=span)
    if engines:
        assert leaderboard._parallelism(config) == {
            "tensor_parallel_size": span, "data_parallel_size": engines, "seed": 42,
        }  # fmt: skip
    else:
        with pytest.raises(UsageError, match=r"ray|does not divide"):
            leaderboard._parallelism(config)


@pytest.mark.parametrize(
    ("positions", "flags", "context"),
    [
        (131_072, {}, 8192),
        (2048, {}, 2048),
        (131_072, {"max_length": 16_384}, 16_384),
        (131_072, {"backend": "vllm"}, 131_072),
        (2048, {"max_length": 2049}, None),
        (None, {}, 8192),
    ],
)
def test_the_default_context_fits_a_gpu(positions: int | None, flags: dict[str, Any], context: int | None) -> None:
    config = LeaderboardConfig(model_path="m", **flags)
    if context is None:
        with pytest.raises(UsageError, match=r"--max_length=2049: .* pass at most 2048"):
            leaderboard.context_length(config, positions)
    else:
        assert leaderboard.context_length(config, positions) == context


def test_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "kldpo run" / "global_step_316"
    checkpoint.mkdir(parents=True)

    def name(model_path: str) -> Path:
        return output_folder(LeaderboardConfig(model_path=model_path))

    assert name("meta-llama/Llama-3.2-1B-Instruct") == Path("outputs/openllm/Llama-3.2-1B-Instruct")
    assert name(str(checkpoint)) == Path("outputs/openllm/kldpo run_global_step_316")
    monkeypatch.chdir(checkpoint)
    assert name(".") == Path("outputs/openllm/kldpo run_global_step_316")
    assert output_folder(LeaderboardConfig(model_path="m", output_path="here")) == Path("here")


def test_data_that_cannot_be_loaded_names_its_task(tiny_policy: Path, tasks: Path, tmp_path: Path) -> None:
    (tasks / "rows.jsonl").unlink()
    config = LeaderboardConfig(
        model_path=str(tiny_policy), tasks="tiny", include_path=str(tasks), output_path=str(tmp_path / "out")
    )
    with pytest.raises(DataError, match=r"task tiny could not be loaded .*rows.jsonl"):
        evaluate_openllm(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("ConnectionError: Couldn't reach 'TAUR-Lab/MuSR' on the Hub", "HF_HOME"),
        ("DatasetNotFoundError: Dataset 'TAUR-Lab/MuSR' is a gated dataset on the Hub.", "hf auth login"),
    ],
)
def test_data_on_the_hub_says_what_to_do(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str, says: str
) -> None:
    kind, _, text = error.partition(": ")

    def failing(*_: Any, **__: Any) -> None:
        raise getattr(datasets.exceptions, kind, ConnectionError)(text)

    monkeypatch.setattr("datasets.load_dataset", failing)
    config = LeaderboardConfig(model_path=str(tiny_policy), tasks="leaderboard_musr", output_path=str(tmp_path / "out"))
    with pytest.raises(DataError, match=rf"task leaderboard_musr .*{says}"):
        evaluate_openllm(config)


def test_ifeval_without_punkt(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise LookupError(name)

    monkeypatch.setattr("nltk.data.find", absent)
    monkeypatch.setattr("nltk.download", lambda name, quiet: False)
    config = LeaderboardConfig(model_path=str(tiny_policy), tasks="leaderboard_ifeval", output_path=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"leaderboard_ifeval .* needs NLTK's punkt_tab.*NLTK_DATA"):
        evaluate_openllm(config)


def test_check_only_refuses_a_locked_folder(tiny_policy: Path, tasks: Path, tmp_path: Path) -> None:
    config = LeaderboardConfig(
        str(tiny_policy), tasks="tiny", include_path=str(tasks), output_path=str(tmp_path / "out"), check_only=True
    )
    with lock_folder(tmp_path / "out"), pytest.raises(UsageError, match="by process"):
        evaluate_openllm(config)
    evaluate_openllm(config)


def test_check_only_is_light(root: Path, tiny_policy: Path, tasks: Path, tmp_path: Path) -> None:
    """--check_only=true finds a wrong task and loads no weights, nor what runs tasks."""
    code = (
        "import sys; from drdpo.config.evaluation import LeaderboardConfig;"
        "from drdpo.evaluation.leaderboard import evaluate_openllm;"
        "m, t = sys.argv[1:];"
        "evaluate_openllm(LeaderboardConfig(model_path=m, tasks='tiny', include_path=t, check_only=True));"
        "assert not {'lm_eval.evaluator', 'matplotlib'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", code, str(tiny_policy), str(tasks)]
    subprocess.run(words, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root / "src")})
    assert not (tmp_path / "outputs").exists()


def test_vllm_back_end_needs_no_nvcc_and_keeps_vllms_offline_defaults(
    tiny_policy: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval starts vllm.LLM and sets no number of sequences; FlashInfer's sampler, made by nvcc, is off."""
    from vllm import LLMEngine, envs

    def start(engine_args: Any, usage_context: Any, **_: Any) -> None:
        assert envs.VLLM_USE_FLASHINFER_SAMPLER is False
        raise RuntimeError(usage_context.value, engine_args.max_num_seqs, engine_args.max_num_batched_tokens)

    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0+cpu" if name == "vllm" else version(name))
    monkeypatch.setattr(LLMEngine, "from_engine_args", start)
    # Left empty first, so that what the step sets is taken back.
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "")
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER")
    config = LeaderboardConfig(str(tiny_policy), tasks="tiny", backend="vllm", include_path=str(tasks), dtype="float32")
    with pytest.raises(RuntimeError) as started:
        leaderboard._load_model(config, leaderboard._model_args(config) | leaderboard._parallelism(config))
    assert started.value.args == ("LLM_CLASS", None, None)


def test_the_templates_date_is_pinned(tiny_policy: Path, tmp_path: Path) -> None:
    """Llama 3.2's template writes today's date unless date_string is given."""
    from lm_eval.api.registry import get_model

    folder = tmp_path / "dated"
    shutil.copytree(tiny_policy, folder)
    today = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    (folder / "chat_template.jinja").write_text(today + "{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    config = LeaderboardConfig(model_path=str(folder), dtype="float32")
    model = get_model("hf").create_from_arg_obj(leaderboard._model_args(config), {"batch_size": 1, "device": "cpu"})
    assert model.apply_chat_template([{"role": "user", "content": "hello"}]) == f"{DATE_STRING}[hello]"


def tiny_config(tiny_policy: Path, tasks: Path, output: Path, **flags: Any) -> LeaderboardConfig:
    flags = {"tasks": "tiny", "dtype": "float32", "batch_size": "1", **flags}
    return LeaderboardConfig(str(tiny_policy), include_path=str(tasks), output_path=str(output), **flags)


def test_a_budget_that_fills_the_context_is_refused_before_the_model_is_loaded(
    tiny_policy: Path, tasks: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_policy, tasks, tmp_path / "out", max_length=30)
    with pytest.raises(UsageError, match="task tiny_generation may generate 30 tokens, but the context of 30 tokens"):
        evaluate_openllm(config)
    assert not (tmp_path / "out").exists()


def test_results_depend_on_the_task_files_and_on_lm_eval(tiny_policy: Path, tasks: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_policy, tasks, tmp_path / "out")
    before = leaderboard._made_by(config)
    assert before["lm-eval version"] == metadata.version("lm-eval")
    assert leaderboard._made_by(config) == before
    (tasks / "choice.yaml").write_text((tasks / "choice.yaml").read_text().replace("acc_norm", "acc_bytes"))
    assert changed(before, leaderboard._made_by(config)).startswith("include_path_fingerprint (")


def test_a_template_that_requires_a_system_message_is_refused(tiny_policy: Path, tasks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "needs a system message"
    shutil.copytree(tiny_policy, folder)
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    with pytest.raises(DataError, match=r"without a system message, .*\(no system message\); pass --apply_chat"):
        evaluate_openllm(tiny_config(folder, tasks, tmp_path / "out"))


KILLED = """
import os, signal, sys
import lm_eval
from drdpo.config.evaluation import LeaderboardConfig
from drdpo.evaluation.leaderboard import evaluate_openllm

run, calls = lm_eval.simple_evaluate, []
def until_the_second(**arguments):
    calls.append(arguments["tasks"])
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(**arguments)
lm_eval.simple_evaluate = until_the_second
model, tasks, output = sys.argv[1:]
evaluate_openllm(LeaderboardConfig(
    model, include_path=tasks, output_path=output, tasks="tiny", dtype="float32", batch_size="1"))
"""


@pytest.mark.slow
def test_a_killed_evaluation_resumes_and_equals_one_run(
    tiny_policy: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    output = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tiny_policy), str(tasks), str(output)], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert not (output / "results.json").exists()
    with pytest.raises(UsageError, match=r"unfinished results from a different configuration: seed \(42 -> 1\)"):
        evaluate_openllm(tiny_config(tiny_policy, tasks, output, seed=1))
    run, ran = lm_eval.simple_evaluate, []

    def recorded(**arguments: Any) -> Any:
        ran.extend(task.task_name for task in arguments["tasks"])
        return run(**arguments)

    monkeypatch.setattr(lm_eval, "simple_evaluate", recorded)
    monkeypatch.setitem(HUB_BENCHMARKS, "tiny_choice", ("who/what", "a_task", "acc_norm"))
    (output / ".eval_results").mkdir()
    (output / ".eval_results" / "leaderboard.yaml").write_text("old")
    (output / ".eval_results" / "of_others.yaml").write_text("[]")
    evaluate_openllm(tiny_config(tiny_policy, tasks, output))
    (entry,) = yaml.safe_load((output / ".eval_results" / "leaderboard.yaml").read_text())
    assert entry["dataset"] == {"id": "who/what", "task_id": "a_task"} and entry["value"] in (0, 25, 50, 75, 100)
    assert sorted(file.name for file in (output / ".eval_results").iterdir()) == ["leaderboard.yaml", "of_others.yaml"]
    assert ran == ["tiny_generation"], "the first task had been finished"
    assert "resuming; 1 of 2 tasks are finished" in capsys.readouterr().out
    assert not (output / ".tasks").exists()
    ours = json.loads((output / "results.json").read_text(encoding="utf-8"))
    config = tiny_config(tiny_policy, tasks, output)
    direct = run(
        model="hf",
        model_args=leaderboard._model_args(config),
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=1,
        device="cpu",
        log_samples=False,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        random_seed=42, numpy_random_seed=42, torch_random_seed=42, fewshot_random_seed=42,
    )  # fmt: skip
    assert direct is not None
    whole = json_safe(direct)
    assert set(whole["groups"]["tiny"]) >= {"acc,none", "acc_stderr,none", "exact_match,first_word"}
    for key in ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert ours[key] == whole[key], key
    assert set(whole) <= set(ours)


RANKS = """
import sys
from pathlib import Path
from types import SimpleNamespace
import lm_eval
import torch
from drdpo import distributed
from drdpo.config.evaluation import LeaderboardConfig
from drdpo.evaluation.leaderboard import _evaluate
from drdpo.folder import Parts

distributed.join()
rank = distributed.rank()

def gather_object(value):
    found = [None, None] if rank == 0 else None
    torch.distributed.gather_object(value, found)
    return found

def run(tasks, **_):
    if tasks[0].task_name == sys.argv[2]:
        sys.exit(9)
    print("ran", tasks[0].task_name)
    by_task = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    return {key: {tasks[0].task_name: {}} for key in by_task} if rank == 0 else None

lm_eval.simple_evaluate = run
model = SimpleNamespace(max_length=3, batch_size=1, gather_object=gather_object, tok_encode=str.split)
text = "more than three words ", "here"
long = [SimpleNamespace(request_type="loglikelihood", args=text, doc_id=number) for number in range(rank + 1)]
tasks = {name: SimpleNamespace(task_name=name, instances=long) for name in ("first", "second")}
parts = Parts(Path(sys.argv[1]), {}, False, rank)
_evaluate(LeaderboardConfig("m"), None, model, {}, tasks, parts)
if rank == 0:
    print([parts.read(number)["cut_prompts"] for number in sorted(parts.done)])
distributed.leave()
"""


def test_ranks_agree_on_what_is_finished(forks: Forks, tmp_path: Path) -> None:
    """lm-eval's data parallelism on two ranks, with a stand-in for lm-eval: one question is cut on rank 0, two on rank 1."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    ended = forks.ranks([sys.executable, script, tmp_path / "parts", "second"], 2)
    assert [(rank.returncode, rank.stdout.count("ran first")) for rank in ended] == [(9, 1)] * 2
    ended = forks.ranks([sys.executable, script, tmp_path / "parts", "none"], 2)
    assert [rank.returncode for rank in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert "ran first" not in ended[0].stdout and ended[1].stdout == "ran second\n"
    assert ended[0].stdout.endswith("ran second\n[3, 3]\n")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True], ids=["two nodes", "one is lost"])
def test_a_job_on_two_nodes_gives_the_table_of_one_machine(
    root: Path, forks: Forks, tiny_policy: Path, tasks: Path, tmp_path: Path, lost: bool
) -> None:
    """openllm_eval.slurm with a stand-in for srun; the second of two tasks is the second node's."""
    script, output = root / "src" / "evaluate_openllm.py", tmp_path / "out"
    flags = [f"--model_path={tiny_policy}", "--tasks=tiny", f"--include_path={tasks}", "--dtype=float32", "--batch_size=1"]
    names = (*RANK_VARIABLES, "DRDPO_NODES", "DRDPO_NODE_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}

    def start(node: int | None, faults: Any = ()) -> Any:
        group = {"DRDPO_NODES": "2"} | ({} if node is None else {"DRDPO_NODE_RANK": str(node)})
        return forks.start([sys.executable, script, *flags, f"--output_path={output}"], kept | group, faults=faults)

    alone = forks.run([sys.executable, script, *flags, f"--output_path={tmp_path / 'alone'}"], kept)
    assert alone.returncode == 0, alone.stderr
    if lost:
        early = start(1)
        assert early.wait() == 2 and "the tasks are not divided among 2 machines" in early.said()[1]
        divided = start(None)
        assert divided.wait() == 0 and "2 of 2 tasks are left for 2 machines" in divided.said()[0]
        dead = {"at": "drdpo.evaluation.leaderboard:_task_part", "call": 1, "when": "after", "signal": "SIGKILL"}
        nodes = [start(0), start(1, [dead])]
        assert statuses(nodes) == [0, -9], [node.said() for node in nodes]
        assert (output / ".lock.1").exists() and not (output / "results.json").exists()

    place = forks.environment(tmp_path / "environment")
    add_program(place / "bin", "srun", "slurm/srun")
    job = {"DRDPO_ENV": str(place), "LAUNCHED": str(tmp_path / "launched"), "SLURM_JOB_ID": "7"}
    job |= {"SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", str(root / "openllm_eval.slurm"), *flags, f"--output_path={output}"]
    done = subprocess.run(command, env=kept | job, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 - lost} of 2 tasks are left for 2 machines" in done.stdout
    ran = sorted(line for line in done.stdout.splitlines() if " of 2: " in line)
    assert ran == ["task 1 of 2: tiny_choice", "task 2 of 2: tiny_generation"][lost:]
    assert (output / "table.md").read_bytes() == (tmp_path / "alone" / "table.md").read_bytes()
    for name, times in (("results.json", ("date",)), ("manifest.json", ("date", "flags"))):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (output, tmp_path / "alone"))
        ours, theirs = (
            {k: v for k, v in found.get("evaluate_openllm", found).items() if k not in times} for found in (ours, theirs)
        )
        assert json.dumps(ours) == json.dumps(theirs), name
    left = sorted(file.name for file in output.iterdir())
    assert left == sorted(file.name for file in (tmp_path / "alone").iterdir())


@pytest.mark.slow
def test_what_the_model_does_not_see_is_counted(tiny_policy: Path, tasks: Path, tmp_path: Path) -> None:
    """Prompts cut from the left, and descriptions that a template without a system role drops, in table and manifest."""
    folder = tmp_path / "no system role"
    shutil.copytree(tiny_policy, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m['role'] != 'system' %}[{{ m['content'] }}]{% endfor %}"
    )
    with (tasks / "choice.yaml").open("a") as stream:
        stream.write('description: "Choose well."\n')
    rows = (tasks / "rows.jsonl").read_text().splitlines()
    long = json.loads(rows[0]) | {"question": "Which? " * 20}
    (tasks / "rows.jsonl").write_text("\n".join([json.dumps(long), *rows[1:]]) + "\n")
    # The long question has 20 * 2 tokens and a few, the others fewer than 20 with their choices.
    evaluate_openllm(tiny_config(folder, tasks, tmp_path / "out", max_length=40, max_gen_toks=8))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["evaluate_openllm"]
    assert manifest["cut_prompts"] == {"tiny_choice": 1, "tiny_generation": 1}
    assert manifest["lost_descriptions"] == ["tiny_choice"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "cut from the left to fit the context: tiny_choice 1 of 4, tiny_generation 1 of 4." in table
    assert "lm-eval drops the description of the task from the prompts of tiny_choice." in table


@pytest.mark.slow
def test_the_wrapper_runs_and_skips(root: Path, smollm: Path, tasks: Path, tmp_path: Path) -> None:
    """bash openllm_eval.slurm on the embedded model; then a second run, which skips."""
    command = [
        "bash", str(root / "openllm_eval.slurm"), f"--model_path={smollm}", "--tasks=tiny", f"--include_path={tasks}",
        "--max_gen_toks=8", "--batch_size=4", "--limit=3", "--dtype=float32",
    ]  # fmt: skip
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "outputs" / "openllm" / smollm.name
    ours = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert ours["n-samples"]["tiny_choice"] == {"original": 4, "effective": 3}
    table = (output / "table.md").read_text(encoding="utf-8")
    assert f"| tiny_choice | 0 | 3 | acc | {ours['results']['tiny_choice']['acc,none']:.4f} |" in table
    printed = next(line for line in done.stdout.splitlines() if line.startswith("tiny ") and "first_word" in line)
    assert printed.split()[-2] == f"{ours['results']['tiny']['exact_match,first_word']:.4f}"
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["evaluate_openllm"]
    assert manifest["made_by"]["max_gen_toks"] == 8
    repeated = parse(LeaderboardConfig, "Step 4b.", [f"--config={output / 'manifest.json'}"])
    assert repeated == parse(LeaderboardConfig, "Step 4b.", command[2:])
    assert manifest["max_length"] == 8192
    assert (manifest["made_by"]["dtype"], manifest["dtype_reason"]) == ("float32", "asked for by --dtype")
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert again.returncode == 0, again.stderr
    assert "skipped" in again.stdout
    changed = subprocess.run([*command, "--seed=1"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert changed.returncode == 2
    assert "seed (42 -> 1)" in changed.stderr


# The wrapper, with a python that prints its arguments ---------------------------------------------------------------------


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """An environment whose python prints its words."""
    return make_environment(tmp_path / "fake env", {"python": "machine/printer"})


def start_wrapper(
    script: Path, fakes: Path, cwd: Path, *words: str, gpus: int = 0, **variables: str
) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_", "DRDPO_"))}
    environment = kept | {"DRDPO_ENV": str(fakes), "GPUS": str(gpus)} | variables
    return subprocess.run(["bash", str(script), *words], capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.parametrize(
    ("words", "gpus"),
    [
        (("--model_path=my model", "--limit", "2"), 0),
        (("--model_path=my model", "--limit", "2"), 1),
        (("--model_path=m", "--backend=vllm"), 4),
        (("--model_path=m", "--backend", "vllm"), 4),
        (("--help",), 0),
        (("--help",), 4),
    ],
)
def test_one_process_needs_no_launcher(root: Path, fakes: Path, tmp_path: Path, words: tuple[str, ...], gpus: int) -> None:
    """No GPU or one, vLLM, which starts its own engines, and --help."""
    done = start_wrapper(root / "openllm_eval.slurm", fakes, tmp_path, *words, gpus=gpus)
    assert done.returncode == 0, done.stderr
    listed = " ".join(f"[{word}]" for word in words)
    assert done.stdout == f"python [{root}/src/evaluate_openllm.py] {listed} WORLD_SIZE=\n"


def test_hf_on_several_gpus_is_data_parallel(root: Path, fakes: Path, tmp_path: Path) -> None:
    done = start_wrapper(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=my model", gpus=4)
    assert done.returncode == 0, done.stderr
    script = f"[{root}/src/evaluate_openllm.py] [--model_path=my model]"
    check, launched = done.stdout.splitlines()
    assert check == f"python {script} [--check_only=true] WORLD_SIZE=4"
    assert launched.startswith(f"python [-P] [{root}/src/drdpo/launch.py] [--standalone]")
    assert "[--nproc-per-node=4] [--log-dir=/dev/null]" in launched
    assert script in launched


@pytest.mark.parametrize("gpus", [0, 4])
def test_the_nodes_of_a_job_start_launchers_of_their_own(root: Path, fakes: Path, tmp_path: Path, gpus: int) -> None:
    add_program(fakes / "bin", "srun", "slurm/srun")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "LAUNCHED": str(tmp_path / "launched")}
    job |= {"SLURM_CPUS_PER_TASK": "7"}
    done = start_wrapper(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=m", gpus=gpus, **job)
    assert done.returncode == 0, done.stderr
    words = f"[{root}/src/evaluate_openllm.py] [--model_path=m]"
    divide, *nodes, write = done.stdout.splitlines()
    assert divide == write == f"python {words} WORLD_SIZE="
    launcher = f"python [-P] [{root}/src/drdpo/launch.py] [--standalone] [--local-addr=127.0.0.1] [--nproc-per-node=4] "
    each = [f"python {words} [--check_only=true] WORLD_SIZE=4", f"{launcher}[--log-dir=/dev/null] {words} WORLD_SIZE="]
    assert sorted(nodes) == sorted(2 * (each if gpus else [divide]))
    srun = (tmp_path / "launched.srun").read_text().splitlines()
    assert srun[:4] == ["--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"] and srun[-1] == "cpus=7"
    failed = start_wrapper(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=m", FAKE_STATUS="3", **job)
    assert failed.returncode == 3 and failed.stdout == f"{divide}\n", "nothing follows"
    checked = start_wrapper(root / "openllm_eval.slurm", fakes, tmp_path, "--check_only=true", **job)
    assert checked.stdout == f"python [{root}/src/evaluate_openllm.py] [--check_only=true] WORLD_SIZE=\n"


def test_under_sbatch_the_script_is_a_copy(root: Path, fakes: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool folder" / "job00042"
    spool.mkdir(parents=True)
    copy = spool / "slurm_script"
    shutil.copy(root / "openllm_eval.slurm", copy)
    repository = tmp_path / "my repository"
    (repository / "src").mkdir(parents=True)
    for name in ("src/env.sh", "src/slurm.sh", "openllm_eval.slurm"):
        shutil.copy(root / name, repository / name)
    done = start_wrapper(copy, fakes, repository, "--model_path=m", SLURM_SUBMIT_DIR=str(repository), SLURM_JOB_ID="42")
    assert done.returncode == 0, done.stderr
    assert f"[{repository}/src/evaluate_openllm.py]" in done.stdout
    lost = start_wrapper(copy, fakes, tmp_path, "--model_path=m", SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="42")
    assert lost.returncode == 2
    assert "submit the job from the repository's folder" in lost.stderr


def headers_of(script: Path) -> dict[str, str]:
    """sbatch reads the headers up to the first command."""
    lines = script.read_text(encoding="utf-8").splitlines()
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    words = [line.removeprefix("#SBATCH --") for line in lines[:first_command] if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def test_sbatch_headers(root: Path) -> None:
    """sbatch writes its log where the folder exists."""
    scripts = ("openllm_eval.slurm", "generate_completions.slurm", "train_alignment.slurm")
    evaluation, sampling, training = (headers_of(root / name) for name in scripts)
    assert "gres" in evaluation and "gpus-per-node" in sampling and "gpus-per-node" in training
    for headers in (evaluation, sampling, training):
        assert (root / headers["output"]).parent.is_dir()
        assert set(headers) >= {"job-name", "nodes", "cpus-per-task", "time", "requeue"}
        assert (headers["ntasks-per-node"], headers["open-mode"]) == ("1", "append")
    # One launcher a node; a job that runs again adds to its log; the batch shell is told before the end.
    assert [headers["signal"][7:] for headers in (training, sampling, evaluation)] == ["300", "120", "120"]
    assert all(headers["signal"].startswith("B:USR1@") for headers in (evaluation, sampling, training))
