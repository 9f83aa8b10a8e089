"""The whole step on the tiny model: files, skipping, refusals, resuming. Prompts are found, read, rendered or rejected."""

import json
import shutil
from pathlib import Path

import pytest
from sampling.conftest import write_prompts

from drdpo import chat
from drdpo.config.data import CompletionsConfig
from drdpo.distributed import Machines
from drdpo.errors import DataError, UsageError
from drdpo.machine import resolve_dtype
from drdpo.models import check_model
from drdpo.records import Completion, Prompt, read_records, read_rows, write_rows
from drdpo.sampling import sample as step
from drdpo.sampling.engines import Sample, TransformersEngine
from drdpo.sampling.sample import (
    _LazyEngines,
    check_context,
    find_dataset,
    read_prompts,
    render,
    sample_completions,
    stop_token_ids,
)


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tiny_policy):
    return chat.load_tokenizer(str(tiny_policy))


@pytest.fixture
def sample(tmp_path, prompts, tiny_policy):
    """Run the step, by default on the test prompts alone, with these flags changed; returns the folder of the samples."""
    usual = {
        "save_path": str(tmp_path / "out put"), "model_path": str(tiny_policy), "dataset": str(prompts), "best_of_n": 3,
        "temperature": 1.0, "max_new_tokens": 6, "prompt_max_len": 64, "engine": "transformers", "dtype": "float32",
        "only_test": True,
    }  # fmt: skip

    def run(**changes):
        config = CompletionsConfig(**(usual | changes))
        sample_completions(config)
        return Path(config.save_path) / "sampled"

    return run


def rows_of(path):
    return [row for _, row in read_rows(path)]


def test_files_hold_n_samples_of_every_prompt_in_order(sample, tokenizer):
    out = sample(only_test=False)
    for split, first_id, count in (("test", 0, 10), ("train", 100, 4)):
        completions = read_records(out / f"{split}.jsonl", Completion.from_row)
        assert [(c.prompt_id, c.sample_id) for c in completions] == [
            (first_id + prompt, sample) for prompt in range(count) for sample in range(3)
        ]
        for completion in completions:
            assert completion.completion[0]["content"] == chat.decode(tokenizer, completion.token_ids)
            assert completion.scores == {}
            assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == 2)
            assert completion.finish_reason == "stop" or len(completion.token_ids) == 6
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sample_test"]["counts"]["completions"] == 30
    assert manifest["sample_train"]["counts"] == {**manifest["sample_train"]["counts"], "prompts": 4, "rejected": 0}
    names = {"manifest.json", "rejects.jsonl", "test.jsonl", "train.jsonl"}
    assert {file.name for file in out.iterdir()} == names


def test_only_test_leaves_train_alone_and_both_splits_add_up(sample, prompts, tokenizer):
    lengths = [len(chat.prompt_token_ids(tokenizer, row["prompt"])) for row in rows_of(prompts / "test.jsonl")]
    limit = max(lengths) - 1
    assert lengths.index(max(lengths)) == 9
    out = sample(prompt_max_len=limit)
    assert not (out / "train.jsonl").exists()
    (reject,) = rows_of(out / "rejects.jsonl")
    assert (Path(reject["file"]).name, reject["row"], reject["prompt_id"]) == ("test.jsonl", 10, 9)
    before = (out / "test.jsonl").read_bytes()
    sample(prompt_max_len=limit, only_test=False)
    assert (out / "test.jsonl").read_bytes() == before
    assert rows_of(out / "rejects.jsonl") == [reject]
    assert {row["prompt_id"] for row in rows_of(out / "test.jsonl")} == set(range(9))
    assert len(rows_of(out / "train.jsonl")) == 12


def test_auto_and_the_precision_that_it_is_are_the_same_run(sample, capsys):
    out, found = sample(dtype="auto"), resolve_dtype("auto")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--dtype=")]
    assert said == [f"--dtype=auto is {found.dtype}: {found.reason}"]
    manifest = json.loads((out / "manifest.json").read_text())["sample_test"]
    assert (manifest["made_by"]["dtype"], manifest["dtype_reason"]) == (found.dtype, found.reason)
    sample(dtype=found.dtype)
    assert capsys.readouterr().out.splitlines()[-1].endswith("skipped")
    other = {"bfloat16": "float32", "float32": "bfloat16"}[found.dtype]
    with pytest.raises(UsageError, match=rf"dtype \({found.dtype} -> {other}\)"):
        sample(dtype=other)


def test_a_finished_step_is_skipped_with_a_line(sample, capsys, monkeypatch):
    out = sample()
    capsys.readouterr()
    monkeypatch.setattr(step, "open_engines", lambda *_: pytest.fail("an engine was started"))
    for engine in ("transformers", "auto"):
        parts = out / ".test.parts"  # of a run that was killed just before it removed them
        parts.mkdir()
        sample(engine=engine)
        assert not parts.exists()
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(str(out / "test.jsonl")) and line.endswith("skipped")


def test_changed_flags_prompts_or_model_are_refused_until_overwrite(sample, prompts, tiny_policy, tmp_path):
    file = sample() / "test.jsonl"
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"temperature \(1.0 -> 0.5\)"):
        sample(temperature=0.5)
    other = shutil.copytree(tiny_policy, tmp_path / "other model")
    (other / "generation_config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(UsageError, match="different configuration: model"):
        sample(model_path=str(other))
    (prompts / "test.jsonl").write_text((prompts / "test.jsonl").read_text().replace("rain", "snow"))
    with pytest.raises(UsageError, match="different configuration: prompts"):
        sample()
    assert file.read_bytes() == before
    sample(overwrite=True)
    assert file.read_bytes() != before


@pytest.mark.parametrize("save_path", ["{0}", "{0}/../{1}", "{0}/.."])
def test_completions_never_overwrite_their_prompts(sample, prompts, tmp_path, save_path):
    """Also where the prompts lie in sampled/, which is where this step writes."""
    dataset = prompts.rename(tmp_path / "sampled")
    before = (dataset / "test.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"--save_path=.*would overwrite the prompts"):
        sample(dataset=str(dataset), save_path=save_path.format(dataset, "sampled"), check_only=True, overwrite=True)
    assert (dataset / "test.jsonl").read_bytes() == before


def test_the_order_of_the_prompts_does_not_matter(sample, prompts, tmp_path):
    rows = rows_of(sample() / "test.jsonl")
    write_rows(prompts / "test.jsonl", rows_of(prompts / "test.jsonl")[::-1])
    turned = rows_of(sample(save_path=str(tmp_path / "turned out")) / "test.jsonl")
    assert sorted(turned, key=lambda row: (row["prompt_id"], row["sample_id"])) == rows != turned


def test_completions_that_the_engine_did_not_end_are_rejects(sample, monkeypatch):
    generate = TransformersEngine.generate

    def odd(self, requests, sampling):
        for index, samples in generate(self, requests, sampling):
            if index == 1:
                samples = [samples[0], Sample([5], "abort"), samples[2]]
            if index == 4:
                samples = [*samples[:2], Sample([5], "stop")]
            yield index, samples

    monkeypatch.setattr(TransformersEngine, "generate", odd)
    out = sample()
    assert [(row["row"], row["prompt_id"], row["reason"]) for row in rows_of(out / "rejects.jsonl")] == [
        (2, 1, "the engine ended a completion by 'abort'"),
        (5, 4, "the engine ended a completion by 'stop' without a stop token"),
    ]
    assert {row["prompt_id"] for row in rows_of(out / "test.jsonl")} == set(range(10)) - {1, 4}


def test_check_only_writes_nothing(sample, tmp_path):
    sample(check_only=True)
    assert not (tmp_path / "out put").exists()
    (tmp_path / "out put").write_text("x")
    with pytest.raises(DataError, match="is a file, not a folder"):
        sample()


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


def test_samples_of_other_template_arguments_are_not_mixed(sample, tiny_policy, tmp_path):
    template = Path(shutil.copytree(tiny_policy, tmp_path / "thinker")) / "chat_template.jinja"
    off = "{% if add_generation_prompt and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    template.write_text(template.read_text() + off)
    one = {"model_path": str(template.parent), "max_prompts": 1, "max_new_tokens": 2}
    sample(**one)
    with pytest.raises(UsageError, match=r"chat_template_kwargs \(None -> .'enable_thinking': False.\)"):
        sample(**one, chat_template_kwargs={"enable_thinking": False})


def user(prompt_id, content):
    return Prompt(prompt_id, [{"role": "user", "content": content}])


def test_auto_prefers_helpsteer_and_says_which(tmp_path, capsys):
    with pytest.raises(DataError, match=r"setup\.sh"):
        find_dataset("auto", tmp_path)
    with pytest.raises(DataError, match="no such folder of prompts"):
        find_dataset(str(tmp_path / "none"), tmp_path)
    for name in ("embedded_prompts", "helpsteer2_prompts"):
        (tmp_path / "datasets" / name).mkdir(parents=True)
        found = find_dataset("auto", tmp_path)
        assert found.name == name
        assert capsys.readouterr().out.splitlines()[-1] == f"prompts: {found} (--dataset=auto)"


def test_test_comes_first_and_train_only_if_wanted(prompts):
    assert list(read_prompts(prompts, only_test=False, max_prompts=None)) == ["test", "train"]
    (prompts / "train.jsonl").unlink()
    assert len(read_prompts(prompts, only_test=True, max_prompts=3)["test"]) == 3
    with pytest.raises(DataError, match=r"train\.jsonl: no such file"):
        read_prompts(prompts, only_test=False, max_prompts=None)


def test_a_prompt_id_that_comes_twice_is_an_error(prompts):
    rows = rows_of(prompts / "test.jsonl")
    write_rows(prompts / "test.jsonl", [*rows, rows[2]])
    with pytest.raises(DataError, match=r"test\.jsonl, row 11: field prompt_id repeats"):
        read_prompts(prompts, only_test=True, max_prompts=2)


def test_a_long_prompt_is_rejected_with_the_reason_and_one_that_just_fits_is_kept(tokenizer):
    prompts = [user(3, "short"), user(4, "word " * 200), user(8, "also short")]
    rendered, (reject,) = render(tokenizer, prompts, Path("d/test.jsonl"), 64)
    assert [(prompt.row, prompt.prompt.prompt_id) for prompt in rendered] == [(1, 3), (3, 8)]
    assert (reject["file"], reject["row"], reject["prompt_id"]) == ("d/test.jsonl", 2, 4)
    assert reject["reason"].endswith("tokens, more than --prompt_max_len=64")
    length = len(chat.prompt_token_ids(tokenizer, prompts[0].prompt))
    assert render(tokenizer, prompts[:1], Path("test.jsonl"), length)[1] == []
    with pytest.raises(DataError, match="none of its 1 prompts can be used; row 1: "):
        render(tokenizer, prompts[:1], Path("test.jsonl"), length - 1)


def test_prompts_that_the_template_rejects_are_rejects(tiny_policy):
    strict = chat.load_tokenizer(str(tiny_policy))
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ bos_token }}{{ messages[0].content }}"
    )
    system = Prompt(1, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])
    (kept,), rejects = render(strict, [system, user(2, "Hi")], Path("test.jsonl"), 64)
    assert kept.prompt.prompt_id == 2
    reason = "the chat template rejects it (no system turns)"
    assert rejects == [{"file": "test.jsonl", "row": 1, "prompt_id": 1, "reason": reason}]


def test_an_answer_ends_at_the_turn_or_at_any_end_the_model_names(tiny_policy, tmp_path, tokenizer):
    assert stop_token_ids(str(tiny_policy), tokenizer) == (2,)
    folder = shutil.copytree(tiny_policy, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2, 17]}))
    assert stop_token_ids(str(folder), tokenizer) == (2, 0, 17)
    (folder / "generation_config.json").unlink()
    assert stop_token_ids(str(folder), tokenizer) == (2,)


def test_prompt_and_completion_must_fit_the_model(tiny_policy):
    model = check_model(str(tiny_policy))
    assert check_context(model, 1024, 1024) == 2048
    with pytest.raises(UsageError, match=r"need 2049 tokens, but .* has a context of 2048"):
        check_context(model, 1024, 1025)
