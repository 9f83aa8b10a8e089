"""The whole step on the tiny model: files, skipping, refusals, resuming, bad input."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drdpo import chat
from drdpo.config.data import CompletionsConfig
from drdpo.distributed import Machines
from drdpo.errors import DataError, ProcessError, UsageError
from drdpo.machine import resolve_dtype
from drdpo.records import Completion, read_records
from drdpo.sampling import engines
from drdpo.sampling import sample as step
from drdpo.sampling.engines import Sample
from drdpo.sampling.sample import _LazyEngines, sample_completions

Flags = Callable[..., CompletionsConfig]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sampled(config: CompletionsConfig) -> Path:
    return Path(config.save_path) / "sampled"


def test_files_hold_n_samples_of_every_prompt_in_order(flags):
    config = flags()
    sample_completions(config)
    tokenizer = chat.load_tokenizer(config.model_path)
    for split, first_id, count in (("test", 0, 10), ("train", 100, 4)):
        completions = read_records(sampled(config) / f"{split}.jsonl", Completion.from_row)
        assert [(c.prompt_id, c.sample_id) for c in completions] == [
            (first_id + prompt, sample) for prompt in range(count) for sample in range(3)
        ]
        for completion in completions:
            assert completion.completion[0]["content"] == chat.decode(tokenizer, completion.token_ids)
            assert completion.scores == {}
            assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == 2)
            assert completion.finish_reason == "stop" or len(completion.token_ids) == 6
    manifest = json.loads((sampled(config) / "manifest.json").read_text())
    assert manifest["sample_test"]["counts"]["completions"] == 30
    assert manifest["sample_train"]["counts"] == {**manifest["sample_train"]["counts"], "prompts": 4, "rejected": 0}
    assert sorted(file.name for file in sampled(config).iterdir()) == [
        "manifest.json", "rejects.jsonl", "test.jsonl", "train.jsonl",
    ]  # fmt: skip


def test_only_test_leaves_train_alone_and_both_splits_add_up(flags):
    tokenizer = chat.load_tokenizer(flags().model_path)
    lengths = [len(chat.prompt_token_ids(tokenizer, row["prompt"])) for row in rows_of(Path(flags().dataset) / "test.jsonl")]
    limit = max(lengths) - 1
    assert lengths.index(max(lengths)) == 9
    sample_completions(config := flags(only_test=True, prompt_max_len=limit))
    assert not (sampled(config) / "train.jsonl").exists()
    (reject,) = rows_of(sampled(config) / "rejects.jsonl")
    assert (Path(reject["file"]).name, reject["row"], reject["prompt_id"]) == ("test.jsonl", 10, 9)
    before = (sampled(config) / "test.jsonl").read_bytes()
    sample_completions(flags(prompt_max_len=limit))
    assert (sampled(config) / "test.jsonl").read_bytes() == before
    assert rows_of(sampled(config) / "rejects.jsonl") == [reject]
    assert {row["prompt_id"] for row in rows_of(sampled(config) / "test.jsonl")} == set(range(9))
    assert len(rows_of(sampled(config) / "train.jsonl")) == 12


def test_auto_and_the_precision_that_it_is_are_the_same_run(flags, capsys):
    sample_completions(config := flags(only_test=True, dtype="auto"))
    found = resolve_dtype("auto")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--dtype=")]
    assert said == [f"--dtype=auto is {found.dtype}: {found.reason}"]
    manifest = json.loads((sampled(config) / "manifest.json").read_text())["sample_test"]
    assert (manifest["made_by"]["dtype"], manifest["dtype_reason"]) == (found.dtype, found.reason)
    sample_completions(flags(only_test=True, dtype=found.dtype))
    assert capsys.readouterr().out.splitlines()[-1].endswith("skipped")
    other = {"bfloat16": "float32", "float32": "bfloat16"}[found.dtype]
    with pytest.raises(UsageError, match=rf"dtype \({found.dtype} -> {other}\)"):
        sample_completions(flags(only_test=True, dtype=other))


def test_a_finished_step_is_skipped_with_a_line(flags, capsys, monkeypatch):
    sample_completions(flags(only_test=True))
    capsys.readouterr()
    monkeypatch.setattr(step, "open_engines", lambda *_: pytest.fail("an engine was started"))
    for same in (flags(only_test=True), flags(only_test=True, engine="auto")):
        parts = sampled(same) / ".test.parts"  # of a run that was killed just before it removed them
        parts.mkdir()
        sample_completions(same)
        assert not parts.exists()
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(str(sampled(same) / "test.jsonl")) and line.endswith("skipped")


def test_changed_flags_prompts_or_model_are_refused_until_overwrite(flags, prompts, tmp_path):
    sample_completions(config := flags(only_test=True))
    before = (sampled(config) / "test.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"temperature \(1.0 -> 0.5\)"):
        sample_completions(flags(only_test=True, temperature=0.5))
    other = tmp_path / "other model"
    shutil.copytree(config.model_path, other)
    (other / "generation_config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(UsageError, match="different configuration: model"):
        sample_completions(flags(only_test=True, model_path=str(other)))
    (prompts / "test.jsonl").write_text((prompts / "test.jsonl").read_text().replace("rain", "snow"))
    with pytest.raises(UsageError, match="different configuration: prompts"):
        sample_completions(flags(only_test=True))
    assert (sampled(config) / "test.jsonl").read_bytes() == before
    sample_completions(flags(only_test=True, overwrite=True))
    assert (sampled(config) / "test.jsonl").read_bytes() != before


@pytest.mark.parametrize("save_path", ["{0}", "{0}/../{1}", "{0}/.."])
def test_completions_never_overwrite_their_prompts(flags, prompts, tmp_path, save_path):
    """Also where the prompts lie in sampled/, which is where this step writes."""
    dataset = prompts.rename(tmp_path / "sampled")
    before = (dataset / "test.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"--save_path=.*would overwrite the prompts"):
        sample_completions(
            flags(dataset=str(dataset), save_path=save_path.format(dataset, "sampled"), check_only=True, overwrite=True)
        )
    assert (dataset / "test.jsonl").read_bytes() == before


def test_the_order_of_the_prompts_does_not_matter(flags, prompts, tmp_path):
    sample_completions(config := flags(only_test=True))
    turned = tmp_path / "turned"
    turned.mkdir()
    lines = (prompts / "test.jsonl").read_text().splitlines()
    (turned / "test.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    sample_completions(other := flags(only_test=True, dataset=str(turned), save_path=str(tmp_path / "turned out")))
    key = lambda row: (row["prompt_id"], row["sample_id"])  # noqa: E731
    assert sorted(rows_of(sampled(other) / "test.jsonl"), key=key) == rows_of(sampled(config) / "test.jsonl")


def dies_after(prompts: int) -> Any:
    """The engine's generate, but it fails after this many prompts."""
    generate = engines.TransformersEngine.generate
    left = iter(range(prompts))

    def failing(self: Any, requests: Any, sampling: Any) -> Iterator[tuple[int, list[Sample]]]:
        for result in generate(self, requests, sampling):
            if next(left, None) is None:
                raise ProcessError("interrupted")
            yield result

    return failing


def test_an_interrupted_run_resumes_to_the_same_file(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "CPU_BLOCK", 9)  # three prompts
    sample_completions(whole := flags(only_test=True, save_path=str(tmp_path / "whole")))
    config = flags(only_test=True)
    with monkeypatch.context() as broken:
        broken.setattr(engines.TransformersEngine, "generate", dies_after(8))
        with pytest.raises(ProcessError):
            sample_completions(config)
    assert [file.name for file in sampled(config).iterdir()] == [".test.parts"]
    with pytest.raises(UsageError, match=r"unfinished results .*: seed \(42 -> 1\)"):
        sample_completions(flags(only_test=True, seed=1))
    capsys.readouterr()
    sample_completions(config)
    assert "18 of 30 completions are finished" in capsys.readouterr().out
    assert (sampled(config) / "test.jsonl").read_bytes() == (sampled(whole) / "test.jsonl").read_bytes()
    assert not (sampled(config) / ".test.parts").exists()


def test_completions_that_the_engine_did_not_end_are_rejects(flags, monkeypatch):
    generate = engines.TransformersEngine.generate

    def odd(self, requests, sampling):
        for index, samples in generate(self, requests, sampling):
            if index == 1:
                samples = [samples[0], Sample([5], "abort"), samples[2]]
            if index == 4:
                samples = [*samples[:2], Sample([5], "stop")]
            yield index, samples

    monkeypatch.setattr(engines.TransformersEngine, "generate", odd)
    sample_completions(config := flags(only_test=True))
    rejects = rows_of(sampled(config) / "rejects.jsonl")
    assert [(row["row"], row["prompt_id"], row["reason"]) for row in rejects] == [
        (2, 1, "the engine ended a completion by 'abort'"),
        (5, 4, "the engine ended a completion by 'stop' without a stop token"),
    ]
    assert {row["prompt_id"] for row in rows_of(sampled(config) / "test.jsonl")} == set(range(10)) - {1, 4}


def test_the_results_may_lie_in_the_models_own_folder(flags, tmp_path, tiny_policy):
    folder = tmp_path / "global_step_3"
    shutil.copytree(tiny_policy, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    config = flags(only_test=True, save_path=str(folder), model_path=str(folder))
    sample_completions(config)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    for later in ("manifest.json", "test.jsonl", "rejects.jsonl", "scores.csv", "report.md", "spider.png"):
        (folder / later).write_text("what the later steps write here")
    (folder / "manifest.json").write_text("{}")
    sample_completions(config)  # is skipped: results do not make it another model


def test_check_only_writes_nothing(flags):
    sample_completions(config := flags(check_only=True))
    assert not Path(config.save_path).exists()
    with pytest.raises(UsageError, match="context of 2048"):
        sample_completions(flags(check_only=True, max_new_tokens=4096))


def test_a_file_in_place_of_the_folder_is_refused(flags, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file, not a folder"):
        sample_completions(flags(save_path=str(tmp_path / "file")))


def test_bad_input_is_one_line_and_status_1(root, forks, flags, prompts):
    config, expected = flags(), f"{prompts / 'test.jsonl'}, row 11"
    with (prompts / "test.jsonl").open("a") as stream:
        stream.write('{"prompt_id": 77}\n')
    words = [f"--{name}={getattr(config, name)}" for name in ("save_path", "model_path", "dataset", "dtype")]
    ended = forks.run([sys.executable, root / "src" / "generate_completions.py", *words, "--only_test=true"])
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert expected in line
    assert not Path(config.save_path).exists()


@pytest.mark.parametrize(
    ("prompts", "n", "engines", "size"),
    [(10162, 10, 8, 636), (10162, 10, 4, 636), (10162, 2, 8, 1271), (3, 2, 8, 1), (10, 20000, 1, 1), (10162, 10, 1, 782)],
)
def test_gpus_have_equally_many_blocks_within_the_largest(prompts, n, engines, size):
    assert _LazyEngines(None, [{}] * engines, on_gpu=True).block_size(prompts, n) == size
    if engines % 2 == 0:  # as one machine with the engines of both
        halves = _LazyEngines(None, [{}] * (engines // 2), True, Machines(2, None))
        assert (halves.count, halves.block_size(prompts, n)) == (engines, size)
    blocks = -(-prompts // size)
    assert blocks <= engines or -(-blocks // engines) * size * n <= 1.03 * prompts * n / engines + size
    assert _LazyEngines(None, [{}] * engines, on_gpu=False).block_size(prompts, n) == max(1, 128 // n)


def test_samples_of_other_template_arguments_are_not_mixed(flags, tiny_policy, tmp_path):
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "thinker"))
    template = folder / "chat_template.jinja"
    off = "{% if add_generation_prompt and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    template.write_text(template.read_text() + off)
    one = {"model_path": str(folder), "only_test": True, "max_prompts": 1, "max_new_tokens": 2}
    sample_completions(flags(**one))
    with pytest.raises(UsageError, match=r"chat_template_kwargs \(None -> .'enable_thinking': False.\)"):
        sample_completions(flags(**one, chat_template_kwargs={"enable_thinking": False}))
