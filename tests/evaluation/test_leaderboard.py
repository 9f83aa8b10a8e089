"""openllm_eval.slurm: flags, tasks and data; the wrapper with stand-ins; marked slow, lm-eval itself on a small model."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import datasets.exceptions
import pytest
import yaml
from harness.forks import statuses, without_ranks
from harness.stand_ins import add_program, make_environment

from drdpo.chat import DATE_STRING
from drdpo.cli import parse
from drdpo.config.evaluation import LeaderboardConfig
from drdpo.errors import DataError, UsageError
from drdpo.evaluation import leaderboard
from drdpo.evaluation.leaderboard import evaluate_openllm, find_tasks, output_folder
from drdpo.evaluation.leaderboard_scores import HUB_BENCHMARKS, json_safe
from drdpo.folder import Parts, changed, lock_folder
from drdpo.records import write_rows

CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATION = """
task: tiny_generation
output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 30}
filter_list: [{name: first_word, filter: [{function: regex, regex_pattern: "([A-Za-z]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, ignore_case: true}]
"""
OF_BOTH = """
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
doc_to_text: "{{question}}"
"""
GROUP = "group: tiny\ntask: [tiny_choice, tiny_generation]\naggregate_metric_list: [{metric: acc}, {metric: exact_match}]\n"
ROWS = [
    ("Which animal barks? Answer with one word.", ["Dog", "Cat"], 0),
    ("Which one is a colour? Answer with one word.", ["Seven", "Blue", "Run"], 1),
    ("Which one is a fruit? Answer with one word.", ["Apple", "Chair", "Stone", "River"], 0),
    ("Which city is the capital of France? Answer with one word.", ["Berlin", "Rome", "Paris"], 2),
]
SMALL = {"tasks": "tiny", "dtype": "float32", "batch_size": "1"}


@pytest.fixture
def tasks(tmp_path):
    """A folder of two small tasks and their group."""
    folder = tmp_path / "my tasks"
    write_rows(folder / "rows.jsonl", (dict(zip(("question", "choices", "label"), row, strict=True)) for row in ROWS))
    for name, text in (("choice", CHOICE + OF_BOTH), ("generation", GENERATION + OF_BOTH), ("group", GROUP)):
        (folder / f"{name}.yaml").write_text(text.replace("ROWS", json.dumps(str(folder / "rows.jsonl"))))
    return folder


@pytest.fixture
def tiny(tiny_policy, tasks, tmp_path):
    """Flags of an evaluation of the small tasks; any may be replaced."""
    usual = {"model_path": str(tiny_policy), "include_path": str(tasks), "output_path": str(tmp_path / "out"), **SMALL}
    return lambda **flags: LeaderboardConfig(**(usual | flags))


@pytest.fixture
def templated(tiny_policy, tmp_path):
    """The tiny policy with another chat template."""

    def copy(template):
        folder = shutil.copytree(tiny_policy, tmp_path / "another template")
        (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    return copy


def test_tasks_are_found_in_both_places(tasks):
    _, leaves = find_tasks(["tiny", "leaderboard_musr"], str(tasks), {})
    assert leaves == [
        "tiny_choice", "tiny_generation", "leaderboard_musr_murder_mysteries", "leaderboard_musr_object_placements",
        "leaderboard_musr_team_allocation",
    ]  # fmt: skip
    _, leaves = find_tasks(["leaderboard"], None, {})
    assert len(leaves) == 1 + 24 + 3 + 7 + 1 + 3
    # A group that lists itself is its other tasks.
    (tasks / "group.yaml").write_text("group: tiny\ntask: [tiny, tiny_choice, nowhere, nowhere]\n")
    with pytest.raises(UsageError, match=r"no task nowhere (or )?in"):
        find_tasks(["tiny"], str(tasks), {})
    (tasks / "group.yaml").write_text("group: tiny\ntask: [tiny, tiny_choice]\n")
    assert find_tasks(["tiny"], str(tasks), {})[1] == ["tiny_choice"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"tasks": "tiny,tiny"}, "names a task twice"), ({"tasks": " ,"}, "--tasks is empty"),
        ({"include_path": "nowhere"}, "--include_path=nowhere: no such folder"), ({"limit": 0}, "must be positive"),
        ({"limit": 2.5}, "whole number"), ({"batch_size": "many"}, "--batch_size=many"),
        ({"max_length": 0}, "--max_length=0"), ({"max_length": 2049}, "--max_length=2049: .* pass at most 2048"),
        ({"tensor_parallel_size": 2}, "requires --backend=vllm"),
        ({"apply_chat_template": False}, "--fewshot_as_multiturn=false"),
        ({"max_length": 30}, "task tiny_generation may generate 30 tokens, but the context of 30 tokens"),
    ],
)  # fmt: skip
def test_flags_and_a_budget_that_fills_the_context_are_refused_before_the_model_is_loaded(flags, says, tiny, tmp_path):
    with pytest.raises(UsageError, match=says):
        evaluate_openllm(tiny(**flags))
    assert not (tmp_path / "out").exists()


def test_vllm_of_another_name_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(leaderboard.metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))
    with pytest.raises(UsageError, match="--backend=hf"):
        evaluate_openllm(tiny(backend="vllm"))


@pytest.mark.parametrize(
    ("backend", "gpus", "span", "ray", "engines"),
    [
        ("vllm", 8, 2, True, 4), ("vllm", 1, 1, False, 1), ("vllm", 0, 1, False, 1), ("vllm", 2, 2, False, 1),
        ("vllm", 8, 3, True, "does not divide"), ("vllm", 4, 1, False, "ray"), ("hf", 0, 1, True, "over GPUs only"),
    ],
)  # fmt: skip
def test_the_gpus_are_shared_out(backend, gpus, span, ray, engines, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(leaderboard, "find_spec", lambda name: ray if name == "ray" else None)
    config = LeaderboardConfig(model_path="m", backend=backend, tensor_parallel_size=span)
    if isinstance(engines, str):
        with pytest.raises(UsageError, match=engines):
            leaderboard._parallelism(config)
    else:
        found = leaderboard._parallelism(config)
        assert found == {"tensor_parallel_size": span, "data_parallel_size": engines, "seed": 42}


@pytest.mark.parametrize(
    ("positions", "flags", "context"),
    [
        (131_072, {}, 8192), (2048, {}, 2048), (131_072, {"max_length": 16_384}, 16_384), (None, {}, 8192),
        (131_072, {"backend": "vllm"}, 131_072),
    ],
)  # fmt: skip
def test_the_default_context_fits_a_gpu(positions, flags, context):
    assert leaderboard.context_length(LeaderboardConfig(model_path="m", **flags), positions) == context


def test_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "kldpo run" / "global_step_316"
    checkpoint.mkdir(parents=True)
    name = lambda model: output_folder(LeaderboardConfig(model))  # noqa: E731
    assert name("meta-llama/Llama-3.2-1B-Instruct") == Path("outputs/openllm/Llama-3.2-1B-Instruct")
    assert name(str(checkpoint)) == Path("outputs/openllm/kldpo run_global_step_316")
    monkeypatch.chdir(checkpoint)
    assert name(".") == Path("outputs/openllm/kldpo run_global_step_316")


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        ("tiny", None, "task tiny_choice could not be loaded .*rows.jsonl"),
        ("leaderboard_musr", ConnectionError("no route"), "task leaderboard_musr_murder_mysteries .*HF_HOME"),
        (
            "leaderboard_musr",
            datasets.exceptions.DatasetNotFoundError("'TAUR-Lab/MuSR' is a gated dataset on the Hub."),
            "task leaderboard_musr_murder_mysteries .*hf auth login",
        ),
        ("leaderboard_ifeval", None, "leaderboard_ifeval needs NLTK's punkt_tab.*NLTK_DATA"),
    ],
)
def test_data_that_cannot_be_loaded_names_its_task_and_the_way_out(names, error, says, tiny, tasks, tmp_path, monkeypatch):
    (tasks / "rows.jsonl").unlink()
    if error:
        monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=error))
    monkeypatch.setattr("nltk.data.find", Mock(side_effect=LookupError))
    monkeypatch.setattr("nltk.download", lambda name, quiet: False)
    with pytest.raises(DataError, match=says):
        evaluate_openllm(tiny(tasks=names))
    assert not (tmp_path / "out").exists()


def test_check_only_is_light_and_refuses_a_locked_folder(tiny, tiny_policy, tasks, tmp_path):
    """--check_only=true looks for the tasks and loads no weights, nor what runs tasks."""
    with lock_folder(tmp_path / "out"), pytest.raises(UsageError, match="by process"):
        evaluate_openllm(tiny(check_only=True))
    code = (
        "import sys; from drdpo.config.evaluation import LeaderboardConfig;"
        "from drdpo.evaluation.leaderboard import evaluate_openllm;"
        "m, t = sys.argv[1:];"
        "evaluate_openllm(LeaderboardConfig(model_path=m, tasks='tiny', include_path=t, check_only=True));"
        "assert not {'lm_eval.evaluator', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_policy), str(tasks)], check=True, cwd=tmp_path)
    assert not (tmp_path / "outputs").exists()


def test_vllm_back_end_needs_no_nvcc_and_keeps_vllms_offline_defaults(tiny, monkeypatch):
    """lm-eval starts vllm.LLM and sets no number of sequences; FlashInfer's sampler, made by nvcc, is off."""
    from vllm import LLMEngine, envs

    def start(engine_args, usage_context, **_):
        assert envs.VLLM_USE_FLASHINFER_SAMPLER is False
        raise RuntimeError(usage_context.value, engine_args.max_num_seqs, engine_args.max_num_batched_tokens)

    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0+cpu" if name == "vllm" else version(name))
    monkeypatch.setattr(LLMEngine, "from_engine_args", start)
    # Left empty first, so that what the step sets is taken back.
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "")
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER")
    config = tiny(backend="vllm")
    with pytest.raises(RuntimeError) as started:
        leaderboard._load_model(config, leaderboard._model_args(config) | leaderboard._parallelism(config))
    assert started.value.args == ("LLM_CLASS", None, None)


def test_the_templates_date_is_pinned(templated):
    """Llama 3.2's template writes today's date unless date_string is given."""
    today = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    folder = templated(today + "{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    config = LeaderboardConfig(folder, dtype="float32")
    model = leaderboard._load_model(config, leaderboard._model_args(config))
    assert model.apply_chat_template([{"role": "user", "content": "hello"}]) == f"{DATE_STRING}[hello]"


def test_results_depend_on_the_task_files_and_on_lm_eval(tiny, tasks):
    before = leaderboard._made_by(tiny())
    assert before["lm-eval version"] == metadata.version("lm-eval")
    assert leaderboard._made_by(tiny()) == before
    (tasks / "choice.yaml").write_text((tasks / "choice.yaml").read_text().replace("acc_norm", "acc_bytes"))
    assert changed(before, leaderboard._made_by(tiny())).startswith("include_path_fingerprint (")


def test_a_template_that_requires_a_system_message_is_refused(tiny, templated):
    folder = templated(
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    with pytest.raises(DataError, match=r"without a system message, .*\(no system message\); pass --apply_chat"):
        evaluate_openllm(tiny(model_path=folder))


@pytest.fixture
def command(root, tiny_policy, tasks):
    """The script and its flags, without --output_path."""
    flags = {"model_path": tiny_policy, "include_path": tasks, **SMALL}
    return [sys.executable, root / "src" / "evaluate_openllm.py", *(f"--{name}={value}" for name, value in flags.items())]


@pytest.mark.slow
def test_a_killed_evaluation_resumes_and_equals_one_run(tiny, command, forks, tasks, tmp_path, monkeypatch, capsys):
    import lm_eval
    from lm_eval.tasks import TaskManager

    output = tmp_path / "out"
    killed = {"at": "lm_eval:simple_evaluate", "call": 2, "when": "before", "signal": "SIGKILL"}
    assert forks.start([*command, f"--output_path={output}"], faults=[killed]).wait() == -9
    assert not (output / "results.json").exists()
    with pytest.raises(UsageError, match=r"unfinished results from a different configuration: seed \(42 -> 1\)"):
        evaluate_openllm(tiny(seed=1))
    run = lm_eval.simple_evaluate
    resumed = Mock(wraps=run)
    monkeypatch.setattr(lm_eval, "simple_evaluate", resumed)
    monkeypatch.setitem(HUB_BENCHMARKS, "tiny_choice", ("who/what", "a_task", "acc_norm"))
    for_the_hub = output / ".eval_results"
    for_the_hub.mkdir()
    (for_the_hub / "leaderboard.yaml").write_text("old")
    (for_the_hub / "of_others.yaml").write_text("[]")
    evaluate_openllm(tiny())
    (entry,) = yaml.safe_load((for_the_hub / "leaderboard.yaml").read_text())
    assert entry["dataset"] == {"id": "who/what", "task_id": "a_task"} and entry["value"] in (0, 25, 50, 75, 100)
    assert sorted(file.name for file in for_the_hub.iterdir()) == ["leaderboard.yaml", "of_others.yaml"]
    ran = [task.task_name for call in resumed.call_args_list for task in call.kwargs["tasks"]]
    assert ran == ["tiny_generation"], "the first task had been finished"
    assert "resuming; 1 of 2 tasks are finished" in capsys.readouterr().out
    assert not (output / ".tasks").exists()
    evaluate_openllm(tiny())
    assert capsys.readouterr().out.splitlines()[-1].endswith("skipped")
    with pytest.raises(UsageError, match=r"different configuration: seed \(42 -> 1\)"):
        evaluate_openllm(tiny(seed=1))
    manifest = parse(LeaderboardConfig, "Step 4b.", [f"--config={output / 'manifest.json'}"])
    assert manifest == tiny(), "what it records repeats it"
    ours = json.loads((output / "results.json").read_text(encoding="utf-8"))
    whole = json_safe(run(
        model="hf", model_args=leaderboard._model_args(tiny()), tasks=["tiny"], batch_size=1, device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), log_samples=False,
        apply_chat_template=True, fewshot_as_multiturn=True,
        random_seed=42, numpy_random_seed=42, torch_random_seed=42, fewshot_random_seed=42,
    ))  # fmt: skip
    assert set(whole["groups"]["tiny"]) >= {"acc,none", "acc_stderr,none", "exact_match,first_word"}
    for key in ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert ours[key] == whole[key], key
    assert set(whole) <= set(ours)


def test_cut_prompts_are_summed_over_ranks_and_kept_by_the_first(tmp_path, monkeypatch):
    """lm-eval's data parallelism with a stand-in for lm-eval: one question is cut on this rank, two on the other."""
    result = lambda tasks, **_: {key: {tasks[0].task_name: {}} for key in leaderboard._BY_TASK}  # noqa: E731
    gather = Mock(side_effect=lambda cut: [cut, 2])
    model = SimpleNamespace(max_length=3, batch_size=1, gather_object=gather, tok_encode=str.split)
    long = SimpleNamespace(request_type="loglikelihood", args=("more than three words ", "here"), doc_id=0)
    tasks = {name: SimpleNamespace(task_name=name, instances=[long]) for name in ("one", "two")}
    # lm-eval returns results on rank 0 only; all ranks take part, and run nothing once rank 0 has finished.
    for rank, run in ((1, lambda **_: None), (0, result), (1, None), (0, None)):
        monkeypatch.setattr("lm_eval.simple_evaluate", run)
        parts = Parts(tmp_path / "parts", {}, False, rank)
        leaderboard._evaluate(LeaderboardConfig("m"), None, model, {}, tasks, parts)
    assert gather.call_count == 4 and [parts.read(number)["cut_prompts"] for number in (0, 1)] == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True], ids=["two nodes", "one is lost"])
def test_a_job_on_two_nodes_gives_the_table_of_one_machine(root, forks, command, tmp_path, lost):
    """openllm_eval.slurm with a stand-in for srun; the second of two tasks is the second node's."""
    output, one = tmp_path / "out", tmp_path / "alone"
    kept = {name: value for name, value in without_ranks().items() if not name.startswith("DRDPO_NODE")}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}

    def start(faults=(), **group):
        return forks.start([*command, f"--output_path={output}"], kept | {"DRDPO_NODES": "2"} | group, faults=faults)

    alone = forks.run([*command, f"--output_path={one}"], kept)
    assert alone.returncode == 0, alone.stderr
    if lost:
        early = start(DRDPO_NODE_RANK="1")
        assert early.wait() == 2 and "the tasks are not divided among 2 machines" in early.said()[1]
        divided = start()
        assert divided.wait() == 0 and "2 of 2 tasks are left for 2 machines" in divided.said()[0]
        dead = {"at": "drdpo.evaluation.leaderboard:_task_part", "call": 1, "when": "after", "signal": "SIGKILL"}
        nodes = [start(DRDPO_NODE_RANK="0"), start([dead], DRDPO_NODE_RANK="1")]
        assert statuses(nodes) == [0, -9], [node.said() for node in nodes]
        assert (output / ".lock.1").exists() and not (output / "results.json").exists()

    place = forks.environment(tmp_path / "environment")
    add_program(place / "bin", "srun", "slurm/srun")
    job = {"DRDPO_ENV": str(place), "LAUNCHED": str(tmp_path / "launched"), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    words = ["bash", str(root / "openllm_eval.slurm"), *command[2:], f"--output_path={output}"]
    done = subprocess.run(words, env=kept | job, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 - lost} of 2 tasks are left for 2 machines" in done.stdout
    ran = sorted(line for line in done.stdout.splitlines() if " of 2: " in line)
    assert ran == ["task 1 of 2: tiny_choice", "task 2 of 2: tiny_generation"][lost:]
    assert (output / "table.md").read_bytes() == (one / "table.md").read_bytes()
    for name, times in (("results.json", ("date",)), ("manifest.json", ("date", "flags"))):
        found = [json.loads((folder / name).read_text()) for folder in (output, one)]
        ours, theirs = (
            {k: v for k, v in each.get("evaluate_openllm", each).items() if k not in times} for each in found
        )  # fmt: skip
        assert json.dumps(ours) == json.dumps(theirs), name  # as text, since NaN is not NaN
    assert {file.name for file in output.iterdir()} == {file.name for file in one.iterdir()}


@pytest.mark.slow
def test_what_the_model_does_not_see_is_counted(tiny, templated, tasks, tmp_path):
    """Prompts cut from the left, and descriptions that a template without a system role drops, in table and manifest."""
    folder = templated("{% for m in messages if m['role'] != 'system' %}[{{ m['content'] }}]{% endfor %}")
    with (tasks / "choice.yaml").open("a") as stream:
        stream.write('description: "Choose well."\n')
    rows = (tasks / "rows.jsonl").read_text().splitlines()
    long = json.loads(rows[0]) | {"question": "Which? " * 20}
    (tasks / "rows.jsonl").write_text("\n".join([json.dumps(long), *rows[1:]]) + "\n")
    # The long question has 20 * 2 tokens and a few, the others fewer than 20 with their choices.
    evaluate_openllm(tiny(model_path=folder, max_length=40, max_gen_toks=8))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["evaluate_openllm"]
    assert manifest["cut_prompts"] == {"tiny_choice": 1, "tiny_generation": 1}
    assert manifest["lost_descriptions"] == ["tiny_choice"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "cut from the left to fit the context: tiny_choice 1 of 4, tiny_generation 1 of 4." in table
    assert "lm-eval drops the description of the task from the prompts of tiny_choice." in table


# The wrapper, with a python that prints its arguments ---------------------------------------------------------------------


@pytest.fixture
def wrapper(root, tmp_path):
    place = make_environment(tmp_path / "fake env", {"python": "machine/printer", "srun": "slurm/srun"})

    def start(*words, script=root / "openllm_eval.slurm", gpus=0, status=0, **variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_", "DRDPO_"))}
        environment = kept | {"DRDPO_ENV": str(place), "GPUS": str(gpus)} | variables
        done = subprocess.run(["bash", str(script), *words], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == status, done.stderr
        return done

    return start


@pytest.mark.parametrize(
    ("words", "gpus"),
    [
        (("--model_path=my model", "--limit", "2"), 0), (("--model_path=my model", "--limit", "2"), 1),
        (("--backend=vllm",), 4), (("--backend", "vllm"), 4), (("--help",), 0), (("--help",), 4),
    ],
)  # fmt: skip
def test_one_process_needs_no_launcher(words, gpus, root, wrapper):
    """No GPU or one, vLLM, which starts its own engines, and --help."""
    listed = " ".join(f"[{word}]" for word in words)
    assert wrapper(*words, gpus=gpus).stdout == f"python [{root}/src/evaluate_openllm.py] {listed} WORLD_SIZE=\n"


@pytest.mark.parametrize("gpus", [0, 4])
def test_hf_is_data_parallel_and_the_nodes_of_a_job_start_launchers_of_their_own(gpus, root, wrapper, tmp_path):
    words = f"[{root}/src/evaluate_openllm.py] [--model_path=m]"
    launcher = f"python [-P] [{root}/src/drdpo/launch.py] [--standalone] [--local-addr=127.0.0.1] [--nproc-per-node=4] "
    one = f"python {words} WORLD_SIZE="
    each = [f"python {words} [--check_only=true] WORLD_SIZE=4", f"{launcher}[--log-dir=/dev/null] {words} WORLD_SIZE="]
    each = each if gpus else [one]
    assert wrapper("--model_path=m", gpus=gpus).stdout.splitlines() == each
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "7", "LAUNCHED": f"{tmp_path}/launched"}
    divide, *nodes, write = wrapper("--model_path=m", gpus=gpus, **job).stdout.splitlines()
    assert divide == write == one and sorted(nodes) == sorted(2 * each)
    srun = (tmp_path / "launched.srun").read_text().splitlines()
    assert srun[:4] == ["--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"] and srun[-1] == "cpus=7"
    failed = wrapper("--model_path=m", gpus=gpus, FAKE_STATUS="3", status=3, **job)
    assert failed.stdout == f"{one}\n", "nothing follows"
    checked = wrapper("--check_only=true", **job)
    assert checked.stdout == f"python [{root}/src/evaluate_openllm.py] [--check_only=true] WORLD_SIZE=\n"


@pytest.mark.parametrize("name", ["openllm_eval.slurm", "generate_completions.slurm", "train_alignment.slurm"])
def test_a_job_that_was_not_submitted_from_the_repository_is_told_so(name, root, wrapper, tmp_path):
    """sbatch runs a copy of the script; tests/test_container.py runs it as one that was."""
    copy = shutil.copy(root / name, tmp_path / "slurm_script")
    lost = wrapper("--model_path=m", script=copy, status=2, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="42")
    assert "submit the job from the repository's folder" in lost.stderr


@pytest.mark.parametrize(
    ("name", "gpus", "seconds"),
    [
        ("openllm_eval.slurm", "gres", "120"), ("generate_completions.slurm", "gpus-per-node", "120"),
        ("train_alignment.slurm", "gpus-per-node", "300"),
    ],
)  # fmt: skip
def test_sbatch_headers(name, gpus, seconds, root):
    """sbatch reads them up to the first command, and writes its log where the folder exists."""
    text = (root / name).read_text(encoding="utf-8")
    head = re.match(r"(#.*\n|\n)*", text)[0]
    headers = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", head, re.MULTILINE))
    assert len(re.findall(r"^#SBATCH", text, re.MULTILINE)) == len(headers)
    assert set(headers) >= {gpus, "job-name", "nodes", "cpus-per-task", "time", "requeue"}
    assert (root / headers["output"]).parent.is_dir()
    # One launcher a node; a job that runs again adds to its log; the batch shell is told before the end.
    assert (headers["ntasks-per-node"], headers["open-mode"], headers["signal"]) == ("1", "append", f"B:USR1@{seconds}")
