"""What every command line refuses, whichever step it is of."""

from typing import Any

import pytest

from drdpo.config import CompletionsConfig, EvaluateConfig, InspectConfig, PreferencesConfig, TrainConfig
from drdpo.errors import UsageError
from drdpo.flags import parse, spelled

TRAIN = ["--model_path=m", "--dataset_path=d", "--save_path=s"]


@pytest.mark.parametrize(
    ("config", "words", "says"),
    [
        (TrainConfig, [*TRAIN, "--save_path="], "--save_path is empty"),
        (TrainConfig, [*TRAIN, "--model_path", ""], "--model_path is empty"),
        (TrainConfig, [*TRAIN, "--dataset-path= "], "--dataset_path is empty"),
        (CompletionsConfig, ["--save_path=s", "--model_path=m", "--reward_model="], "--reward_model is empty"),
        (PreferencesConfig, ["--ArmoRM=1.0", "--completions="], "--completions is empty"),
        (EvaluateConfig, ["--runs", "a=b", "", "--output_path=o"], "--runs is empty"),
        (TrainConfig, [*TRAIN, "--drdpo_beta=nan"], "--drdpo_beta=nan is not a finite number"),
        (TrainConfig, [*TRAIN, "--kldpo_tau=inf"], "--kldpo_tau=inf is not a finite number"),
        (TrainConfig, [*TRAIN, "--learning_rate=-inf"], "--learning_rate=-inf is not a finite number"),
        (CompletionsConfig, ["--save_path=s", "--model_path=m", "--temperature=inf"], "--temperature=inf is not"),
        (InspectConfig, [" "], "^path is empty"),
    ],
)
def test_empty_words_and_numbers_that_are_none_are_named(config: type[Any], words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(config, "A step.", words)


def test_a_positional_word_stands_where_it_likes_and_is_named_without_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["a b", "--samples=0"], ["--samples", "0", "a b"], ["--samples=0", "--", "a b"]):
        config = parse(InspectConfig, "A step.", words)
        assert (config.path, config.samples) == ("a b", 0)
    assert (spelled(InspectConfig, "path"), spelled(InspectConfig, "samples")) == ("path", "--samples")
    with pytest.raises(SystemExit) as stop:
        parse(InspectConfig, "A step.", ["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "positional arguments:\n  path " in printed
    assert "--path" not in printed


@pytest.mark.parametrize(
    ("words", "says"), [([], "required: path"), (["a", "b"], "unrecognized arguments: b"), (["--path=a"], "required: path")]
)
def test_a_missing_or_a_second_positional_word_ends_with_a_usage_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(InspectConfig, "A step.", words)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
