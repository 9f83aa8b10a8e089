"""A command line from a dataclass: every field is a flag, spelled once, with its help and its default."""

import dataclasses
import math
import sys
from typing import Any, TypeVar

from transformers import HfArgumentParser

from drdpo.errors import UsageError
from drdpo.objectives import PHANTOM_FLAG, objective_from_flag
from drdpo.records import is_text

Config = TypeVar("Config")


def flag(help: str, default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A dataclass field that is a flag; without a default the flag is required."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def positional(help: str) -> Any:
    """A required dataclass field that stands on the command line as a word without a name in front of it."""
    return dataclasses.field(metadata={"help": help, "positional": True})


class _Parser(HfArgumentParser):
    """HfArgumentParser that knows `positional`: it hands a field's metadata, and --names, to add_argument as they are."""

    def add_argument(self, *names: str, **settings: Any) -> Any:
        if settings.pop("positional", False):
            settings.pop("required")  # argparse's word for it is that there is no default
            names = (names[0].removeprefix("--"),)
        return super().add_argument(*names, **settings)


def parse(config_class: type[Config], description: str, arguments: list[str] | None = None) -> Config:
    """Parse a command line into a frozen dataclass.

    Args:
        config_class: one of the classes of drdpo.config.
        description: one sentence for --help.
        arguments: the words of the command line, sys.argv without its first word by default.

    Raises:
        SystemExit: status 2 after a usage line for an unknown or abbreviated flag or a value of the wrong type; status 0
            after --help.
        UsageError: a text flag that is empty, a number that is not finite, a
            value or a combination that the dataclass refuses.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(word.split("=")[0].lstrip("-").replace("-", "_") == PHANTOM_FLAG for word in arguments):
        objective_from_flag(PHANTOM_FLAG)
    parser = _Parser([config_class], description=description, allow_abbrev=False)
    for action in parser._actions:
        action.help = action.help and action.help.replace("%", "%%")  # argparse fills what follows a %
    _check_values(config_class, vars(parser.parse_known_args(arguments)[0]))
    config, unknown = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        # Left to itself HfArgumentParser raises ValueError here: a traceback and status 1.
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return config


def _check_values(config_class: type[Any], values: dict[str, Any]) -> None:
    """Refuse what no flag means: an empty path would be the current folder, and no comparison refuses a NaN."""
    for name, value in values.items():
        shown = spelled(config_class, name)
        for word in value if isinstance(value, list) else [value]:
            empty = isinstance(word, str) and not word.strip()
            require(not empty, f"{shown} is empty; give it a value (is a shell variable unset?)")
            require(not isinstance(word, str) or is_text(word), f"{shown} holds bytes that are not UTF-8 text")
            require(
                not isinstance(word, int) or isinstance(word, bool) or abs(word) < 2**63, f"{shown}={word} is beyond 64 bits"
            )
            require(not isinstance(word, float) or math.isfinite(word), f"{shown}={word} is not a finite number")


def spelled(config_class: type[Any], name: str) -> str:
    """How the command line spells a field: `--name`, or `name` where it is positional."""
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    return name if field.metadata.get("positional") else f"--{name}"


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved flags, for manifests."""
    return dataclasses.asdict(config)


def require(condition: bool, message: str) -> None:
    """Raise UsageError with `message` unless `condition` holds."""
    if not condition:
        raise UsageError(message)
