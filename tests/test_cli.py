"""What every command line refuses, whichever step it is of."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from drdpo.cli import as_dict, check_bounds, flag, flag_in_file, parse, spelled
from drdpo.config.data import CompletionsConfig, PreferencesConfig
from drdpo.config.evaluation import (
    CompareMixturesConfig,
    CompareOpenllmConfig,
    EvaluateConfig,
    InspectConfig,
    LeaderboardConfig,
)
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError, UsageError
from drdpo.folder import write_manifest

TRAIN = ["--model_path=m", "--dataset_path=d", "--save_path=s"]


@dataclass(frozen=True)
class Odd:
    """Every kind of flag."""

    some_count: int = flag("at least one", 2, at_least=1)
    share: float = flag("100% of it", 0.5, above=0, at_most=1)
    steps: list[int] = flag("each of them", [], at_least=0)
    limit: float | None = flag("none is no limit", None, above=0, below=8)
    kind: Literal["a", "b"] = flag("which", "a")
    on: bool = flag("is on", True)
    off_now: bool = flag("is off", False)

    def __post_init__(self) -> None:
        check_bounds(self)


@pytest.mark.parametrize(
    ("config", "words", "says"),
    [
        (TrainConfig, [*TRAIN, "--save_path="], "--save_path is empty"),
        (TrainConfig, [*TRAIN, "--dataset-path", " "], "--dataset_path is empty"), (InspectConfig, [" "], "^path is empty"),
        (CompletionsConfig, ["--save_path=s", "--model_path=m", "--reward_model="], "--reward_model is empty"),
        (EvaluateConfig, ["--runs", "a=b", "", "--output_path=o"], "--runs is empty"),
        *((TrainConfig, [*TRAIN, f"--kldpo_tau={no}"], f"--kldpo_tau={no} is not a") for no in ("nan", "inf", "-inf")),
        (CompletionsConfig, ["--save_path=s", "--model_path=m", "--temperature=inf"], "--temperature=inf is not"),
        (Odd, ["--some_count=0"], "--some_count=0 must be at least 1"),
        (Odd, ["--share=0"], r"--share=0.0 must lie in \(0, 1\]"), (Odd, ["--limit=8"], r"--limit=8.0 must lie in \(0, 8\)"),
        (Odd, ["--steps", "3", "-1"], "--steps=-1 must not be negative"),
    ],
)  # fmt: skip
def test_empty_words_and_numbers_out_of_bounds_are_named(config, words, says):
    with pytest.raises(UsageError, match=says):
        parse(config, "A step.", words)


def test_a_positional_word_stands_where_it_likes_and_is_named_without_dashes(capsys):
    for words in (["a b", "--samples=0"], ["--samples", "0", "a b"], ["--samples=0", "--", "a b"]):
        config = parse(InspectConfig, "A step.", words)
        assert (config.path, config.samples) == ("a b", 0)
    assert (spelled(InspectConfig, "path"), spelled(InspectConfig, "samples")) == ("path", "--samples")


@pytest.mark.parametrize(
    ("config", "has"),
    [(InspectConfig, ["positional arguments: path "]),
     (Odd, ["at least one (default: 2)", "100% of it (default: 0.5)", "is on (default: true)", "--some-count"])],
)  # fmt: skip
def test_help_shows_defaults(config, has, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(config, "A step.", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and all(text in shown for text in has) and "--path" not in shown


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}), (["--some-count", "3", "--share=1"], {"some_count": 3, "share": 1.0}),
        (["--steps", "4", "0", "--limit=0.5", "--kind=b"], {"steps": [4, 0], "limit": 0.5, "kind": "b"}),
        (["--off_now", "--on=FALSE"], {"off_now": True, "on": False}),
        (["--off-now", "yes", "--no_on"], {"off_now": True, "on": False}), (["--off_now=0", "--no-on", "--on"], {}),
    ],
)  # fmt: skip
def test_every_kind_of_flag(words, changes):
    assert parse(Odd, "A step.", words) == Odd(**changes)
    with pytest.raises(UsageError):
        Odd(share=float("nan"))
    config = parse(TrainConfig, "A step.", [*TRAIN, '--chat_template_kwargs={"enable_thinking": false}'])
    assert config.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("config", "words", "says"),
    [
        *((Odd, [word], "") for word in ("--some_coun=3", "--some_count=x", "--kind=c", "--on=maybe", "--steps", "--share",
                                         "--no_off_now", "y\nz")),
        (InspectConfig, [], "required: path"), (InspectConfig, ["a", "b"], "unrecognized arguments: b"),
        (InspectConfig, ["--path=a"], "required: path"),
        (TrainConfig, [*TRAIN, "--chat_template_kwargs={enable_thinking: false}"], "is not JSON"),
        (TrainConfig, [*TRAIN, "--chat_template_kwargs=false"], "is not a JSON object such as"),
    ],
)  # fmt: skip
def test_what_argparse_refuses_is_one_line(config, words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(config, "A step.", words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


@pytest.mark.parametrize("suffix", [".json", ".yaml", "manifest"])
def test_flags_of_a_file_stand_before_those_of_the_command_line(suffix, tmp_path, capsys):
    flags = as_dict(Odd(some_count=5, share=0.25, kind="b", steps=[3, 4], on=True, off_now=False))
    path = tmp_path / f"flags{suffix.removeprefix('manifest') or '.json'}"
    path.write_text(json.dumps({"assets": {}, "step": {"flags": flags}} if suffix == "manifest" else flags))
    assert parse(Odd, "A step.", [f"--config={path}"]) == Odd(**flags)
    changed = parse(Odd, "A step.", ["--some-count", "7", "--config", str(path), "--no-on", "--steps", "1"])
    assert changed == Odd(**flags | {"some_count": 7, "on": False, "steps": [1]})
    assert "--on (there: true), --some_count (there: 5), --steps (there: 3 4)" in capsys.readouterr().err
    assert flag_in_file(str(path), "some_count") == "5" and flag_in_file(str(path), "nothing") == ""


TRAINED = TrainConfig("m", "d", "s", kldpo_tau=0.05, max_steps=7, push_to_hub="me/x", resume="never", dry_run=True)
SAMPLED = CompletionsConfig(
    "s", "m", seed=-3, max_prompts=7, chat_template_kwargs={"a": [1]}, overwrite=True, check_only=True
)


@pytest.mark.parametrize(
    ("used", "once"),
    [
        (TRAINED, {"push_to_hub": None, "resume": "auto", "dry_run": False}),
        (SAMPLED, {"overwrite": False, "check_only": False}),
        (PreferencesConfig(ArmoRM=0.25, weights=["mine=0.75"], standardize=False, dry_run=True, overwrite=True),
         {"dry_run": False, "overwrite": False}),
        (EvaluateConfig(["a=b", "-c=d e"], "o", objectives=["x", "y"], bootstrap=100), {}),
        (LeaderboardConfig("m", tasks="a,b", limit=5.0, backend="vllm", overwrite=True, check_only=True),
         {"overwrite": False, "check_only": False}),
        (CompareOpenllmConfig(["1B/a=b"], "o"), {}),
        (CompareMixturesConfig(["a=b", "c=d"], "o"), {}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_manifest_gives_back_the_flags_but_for_those_of_one_start(used, once, tmp_path):
    write_manifest(tmp_path, "assets", {})
    write_manifest(tmp_path, "a_step", {}, as_dict(dataclasses.replace(used, **once)))
    write_manifest(tmp_path, "another", {}, {"not": "a flag of it"})
    write_manifest(tmp_path, "a_step", {}, as_dict(used))
    config = [f"--config={tmp_path / 'manifest.json'}"]
    assert parse(type(used), "A step.", config) == dataclasses.replace(used, **once)


def test_the_latest_flags_of_a_manifest_count_and_a_file_of_ones_own_may_start_over(tmp_path):
    for step, only in (("sample_test", True), ("sample_train", False), ("assets", None)):
        write_manifest(tmp_path, step, {}, None if only is None else as_dict(CompletionsConfig("s", "m", only_test=only)))
    assert not parse(CompletionsConfig, "A step.", [f"--config={tmp_path / 'manifest.json'}"]).only_test
    write_manifest(tmp_path, "sample_test", {}, as_dict(CompletionsConfig("s", "m", only_test=True)))
    assert parse(CompletionsConfig, "A step.", [f"--config={tmp_path / 'manifest.json'}"]).only_test
    (tmp_path / "own.yaml").write_text("push_to_hub: me/x\nresume: never\n")
    config = parse(TrainConfig, "A step.", [*TRAIN, f"--config={tmp_path / 'own.yaml'}"])
    assert (config.push_to_hub, config.resume) == ("me/x", "never")


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "No such file"), ("{", "Expecting"), ("[1]", "not an object"), ('{"odd": 1}', "odd is no flag"),
     ('{"some_count": [{}]}', "value of some_count"), ('{"some_count": [[1]]}', "value of some_count")],
)  # fmt: skip
def test_a_file_that_has_no_flags_is_refused_by_name(text, says, tmp_path):
    path = tmp_path / "flags.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=says) as refused:
        parse(Odd, "A step.", [f"--config={path}"])
    assert str(path) in str(refused.value)


HELP = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
loaded = {name.partition(".")[0] for name in sys.modules}
heavy = loaded - set(sys.stdlib_module_names) - {"drdpo", "sitecustomize"}
configs = [name for name in sys.modules if name.startswith("drdpo.config.")]
print("loaded", *sorted(name for name in heavy if not name.startswith("_")), len(configs), file=sys.stderr)
"""


@pytest.mark.parametrize("script", sorted((Path(__file__).parents[1] / "src").glob("*.py")), ids=lambda path: path.name)
def test_help_loads_no_library(script):
    done = subprocess.run([sys.executable, "-c", HELP, str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    assert done.stderr.splitlines()[-1] == "loaded 1", "one config and the standard library"
