"""A command line from a dataclass: every field is a flag, spelled once, with its help text, default and bounds."""

import argparse
import dataclasses
import json
import math
import operator
import os
import sys
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from drdpo.errors import DataError, UsageError, is_text, one_line, one_line_errors
from drdpo.objectives import PHANTOM_FLAG, objective_from_flag

Config = TypeVar("Config")

_BOUNDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}
_TRUTH = dict.fromkeys(("true", "yes", "t", "y", "1"), True) | dict.fromkeys(("false", "no", "f", "n", "0"), False)


def flag(help: str, default: Any = dataclasses.MISSING, once: bool = False, **bounds: float) -> Any:
    """A dataclass field that is a flag; without a default the flag is required.

    Args:
        once: for one start of the command only; the files of a run do not record it, see as_dict.
        bounds: `above` or `at_least`, then `below` or `at_most`, for the number or every number of a list.
    """
    metadata = {"help": help, "bounds": bounds, "once": once}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def positional(help: str) -> Any:
    """A required dataclass field that is a positional argument."""
    return dataclasses.field(metadata={"help": help, "positional": True})


def parse(config_class: type[Config], description: str, arguments: list[str] | None = None) -> Config:
    """Parse a command line, sys.argv[1:] by default, into a frozen dataclass of drdpo.config; --help shows the description.

    Raises:
        SystemExit: status 2 after one line for an unknown flag or a value of the wrong type; status 0 after --help.
        UsageError: an empty text, a number that is not finite, a value or combination that the dataclass refuses.
        DataError: --config is not a file of flags.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(word.split("=")[0].lstrip("-").replace("-", "_") == PHANTOM_FLAG for word in arguments):
        objective_from_flag(PHANTOM_FLAG)
    parser = _Parser(description=description, allow_abbrev=False)
    kinds = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        _add_flag(parser, field, kinds[field.name])
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="take flags from a run's config.json or manifest.json, or from YAML; flags given here win",
    )
    values = vars(parser.parse_args(_with_file(config_class, arguments)))
    del values["config"]
    for name, value in values.items():
        for word in value if isinstance(value, list) else [value]:
            _check_word(spelled(config_class, name), word)
    return config_class(**values)


def run_step(config_class: type[Any], description: str, step: str) -> None:
    """Parse the command line of an entrypoint, then import and call its step, `module:function`: --help loads no library."""
    with one_line_errors():
        config = parse(config_class, description)
        module, _, function = step.partition(":")
        getattr(import_module(module), function)(config)


def flag_in_file(path: str, name: str) -> str:
    """A flag's value in a file for --config, for src/env.sh; empty if it has none."""
    return next((str(flags[name]) for flags in _load(Path(path)) if flags.get(name) is not None), "")


def check_bounds(config: Any) -> None:
    """Raise UsageError for a flag out of its bounds; call it in the __post_init__ of a config class."""
    for field in dataclasses.fields(config):
        value, bounds = getattr(config, field.name), field.metadata.get("bounds", {})
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not all(_BOUNDS[name](number, bound) for name, bound in bounds.items()):
                raise UsageError(f"--{field.name}={number} must {_in_words(bounds)}")


def spelled(config_class: type[Any], name: str) -> str:
    """A field on the command line: `--name`, or `name` if it is positional."""
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    return name if field.metadata.get("positional") else f"--{name}"


def as_dict(config: Any) -> dict[str, Any]:
    """The flags that a run's files record and --config takes from them: all but those marked `once`, as a repeated run must
    not replace results, start over or upload because the first one did."""
    once = {field.name for field in dataclasses.fields(config) if field.metadata.get("once")}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in once}


def require(condition: bool, message: str) -> None:
    """Raise UsageError with `message` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}; --help lists the flags\n")


def _add_flag(parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]", kind: Any) -> None:
    """Add --some_name, also spelled --some-name; if it is not false by default also --no_some_name."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    required = default is dataclasses.MISSING
    note = "" if required or default in (None, []) else f" (default: {str(default).lower() if kind is bool else default})"
    help = (field.metadata["help"] + note).replace("%", "%%")  # argparse fills in what follows a %
    if field.metadata.get("positional"):
        parser.add_argument(field.name, type=kind, help=help)
        return
    settings: dict[str, Any] = {"default": None if required else default, "required": required, "help": help}
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        settings["choices"] = get_args(kind)
    elif get_origin(kind) is list:
        settings |= {"type": get_args(kind)[0], "nargs": "+"}
    elif get_origin(kind) is dict:
        settings["type"] = _json_object
    elif kind is bool:
        settings |= {"type": _truth, "nargs": "?", "const": True}
    else:
        settings["type"] = kind
    parser.add_argument(*_spellings(field.name), **settings)
    if kind is bool and default is not False:
        parser.add_argument(
            *_spellings(f"no_{field.name}"), action="store_false", dest=field.name, default=argparse.SUPPRESS,
            help=f"--{field.name}=false",
        )  # fmt: skip


def _with_file(config_class: type[Any], arguments: list[str]) -> list[str]:
    """The command line behind the flags of the file that its --config names; prints what the command line changes.

    Raises:
        DataError: not a file of flags, a flag that this command does not have, or a value that is none.
    """
    asking = _Parser(add_help=False, allow_abbrev=False)
    asking.add_argument("--config", type=Path)
    path = asking.parse_known_args(arguments)[0].config
    if path is None:
        return arguments
    names = {field.name for field in dataclasses.fields(config_class) if not field.metadata.get("positional")}
    candidates = _load(path)
    found = next((flags for flags in candidates if set(flags) <= names), candidates[0])
    if unknown := sorted(str(name) for name in set(found) - names):
        raise DataError(f"--config={path}: {one_line(unknown[0])} is no flag of this command; --help lists the flags")
    filed = {name: _spelled_value(path, name, value) for name, value in found.items() if value not in (None, [])}
    given = {word.lstrip("-").split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    changed = sorted(name for name in filed if name in given or f"no_{name}" in given)
    if os.environ.get("RANK", "0") == "0":
        was = ", ".join(f"--{name} (there: {' '.join(filed[name])})" for name in changed) or "nothing"
        print(f"flags of {path}; changed on the command line: {was}", file=sys.stderr)
    words = []
    for name, value in filed.items():
        # One word, so that a value may begin with a dash; a list needs several.
        if name not in changed:
            words += [f"--{name}={value[0]}"] if len(value) == 1 else [f"--{name}", *value]
    return [*words, *arguments]


def _load(path: Path) -> list[dict[Any, Any]]:
    """The object of flags in a file, then those of each step if it is a manifest, the latest first."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            found = yaml.safe_load(text)
        else:
            found = json.loads(text)
    except Exception as error:  # OSError, ValueError, and yaml's, which share no other base class
        raise DataError(f"--config={path}: {one_line(str(error), 200)}") from error
    if not isinstance(found, dict):
        raise DataError(f"--config={path}: not an object of flags")
    steps = [entry["flags"] for entry in found.values() if isinstance(entry, dict) and isinstance(entry.get("flags"), dict)]
    return [found, *reversed(steps)]


def _spelled_value(path: Path, name: str, value: Any) -> list[str]:
    if isinstance(value, dict):  # JSON on the command line too
        return [json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | bool | int | float) for each in values):
        raise DataError(f"--config={path}: the value of {name} is neither text, number, truth value nor a list of them")
    return [str(each).lower() if isinstance(each, bool) else str(each) for each in values]


def _spellings(name: str) -> dict[str, None]:
    return dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))


def _truth(word: str) -> bool:
    if word.lower() not in _TRUTH:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return _TRUTH[word.lower()]


def _json_object(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{word!r} is not a JSON object such as " + '{"name": false}')
    return value


def _check_word(shown: str, word: Any) -> None:
    """Refuse what no flag can mean: an empty path would be the current folder, and bounds do not exclude NaN."""
    if isinstance(word, str):
        require(bool(word.strip()), f"{shown} is empty; pass a value (is a shell variable unset?)")
        require(is_text(word), f"{shown} contains bytes that are not UTF-8 text")
    elif isinstance(word, int):
        require(abs(word) < 2**63, f"{shown}={word} is beyond 64 bits")
    elif isinstance(word, float):
        require(math.isfinite(word), f"{shown}={word} is not a finite number")


def _in_words(bounds: dict[str, float]) -> str:
    (low_name, low), *rest = bounds.items()
    if rest:
        ((high_name, high),) = rest
        return f"lie in {'(' if low_name == 'above' else '['}{low}, {high}{')' if high_name == 'below' else ']'}"
    if low == 0 and low_name in ("above", "at_least"):
        return "be positive" if low_name == "above" else "not be negative"
    return f"be {low_name.replace('_', ' ')} {low}"
