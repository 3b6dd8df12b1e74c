"""From flags and a YAML file to dataclasses, as TRL does it: the file sets defaults, and the command line wins."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from hf_trak.cli.main import OneLineErrors, refuse_usage

if TYPE_CHECKING:
    from hf_trak.index import AttributionIndex


class Collect(argparse.Action):
    """Lets a flag that takes several values be repeated: `--model a --model b` is `--model a b`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = getattr(namespace, self.dest)
        setattr(namespace, self.dest, list(values) if found is self.default else [*found, *values])


@dataclass(kw_only=True)
class LoadingArguments:
    """What an index is loaded with, in place of what it records."""

    model: list[str] | None = field(
        default=None, metadata={"help": "Checkpoints, in order, in place of the recorded ones.", "action": Collect}
    )
    base: str | None = field(
        default=None, metadata={"help": "Of an index of points of a path: the base, in place of the recorded one."}
    )
    processor: str | None = field(
        default=None,
        metadata={
            "help": "Folder or repository of the tokenizer, image processor or both, for checkpoints that have none; by default the recorded "
            "one, or the checkpoint's own."
        },
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "The index's own task, module:name, as `hf-trak featurize --task` takes it. Its code is run; an index does not hold it."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of an index repository."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that the checkpoints bring along. Without it, such checkpoints are refused."},
    )

    def load(self, index: str) -> AttributionIndex:
        """Return an index."""
        from hf_trak.index import AttributionIndex

        return AttributionIndex.from_pretrained(index, revision=self.revision, **self.loading())

    def loading(self) -> dict[str, Any]:
        """Return what [`AttributionIndex`] takes beside the folder."""
        from hf_trak.tasks import import_task

        return {
            "models": self.model,
            "base": self.base,
            "processing_class": self.processor,
            "task": None if self.task is None else import_task(self.task),
            "trust_remote_code": self.trust_remote_code,
        }


class _Parser(HfArgumentParser):
    """transformers' parser of dataclasses, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        refuse_usage(self, message)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of examples, and shows defaults that say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, argparse.SUPPRESS) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = " ".join([action.option_strings[0], self._format_args(action, action.dest.upper())])
        return action.option_strings[0] if action.nargs == "?" else values.strip()


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's safe loader, without two of its habits: of a key that is there twice it takes the last, and `<<` copies mappings, which a few
    lines can make billions of."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping.

        Raises:
            yaml.YAMLError: If a key is there twice, or is `<<`.
        """
        seen: set[str] = set()
        for key in (
            [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)] if isinstance(node, yaml.MappingNode) else []
        ):
            if key.value in seen or key.tag == "tag:yaml.org,2002:merge":
                said = "is there twice; keep one of the lines" if key.value in seen else "is not served; write the lines out"
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} {said}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return a parser's flags. argparse has no public name for them."""
    return parser._actions


def make_parser(dataclasses: Sequence[type], *, command: str, usage: str, description: str) -> HfArgumentParser:
    """Return a parser of the dataclasses' fields, and `--config`."""
    parser = _Parser(
        dataclasses,
        prog=f"hf-trak {command}",
        usage=f"hf-trak {command} {usage}",
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a YAML file of these flags, without the dashes; flags given here win")
    own = {name for dataclass in dataclasses for name in dataclass.__annotations__}
    for actions in (
        actions_of(parser),
        parser._optionals._group_actions,
    ):  # what is needed first, then what other commands lack
        actions.sort(key=lambda action: (action.dest != "help", not action.required, action.dest not in own))
    return parser


def parse(parser: HfArgumentParser, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return one instance per dataclass.

    Raises:
        ValueError: If the file of `--config` cannot be used, or names a flag that does not exist.
    """
    finder = OneLineErrors(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config = None if {"-h", "--help"} & set(arguments) else finder.parse_known_args(arguments)[0].config
    if config is not None:
        set_defaults_from_yaml(parser, Path(config))
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        list(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}{_near_misses(parser, [unknown[0].split('=')[0].lstrip('-')])}")
    return tuple(parsed)


def rows_at_a_time(text: str, flag: str) -> int | str:
    """Return the value of a flag as a number of rows, or "auto".

    Raises:
        ValueError: If it is something else.
    """
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{flag} must be auto or a whole number of at least 1, but is {text!r}.")
    return int(text)


def name_positions(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return arguments with flags put before those that come first and have none: `card INDEX` is `card --index INDEX`."""
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    flags = [word for name, value in zip(names, arguments[:count], strict=False) for word in (f"--{name}", value)]
    return [*flags, *arguments[min(count, len(names)) :]]


def set_defaults_from_yaml(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the values of a YAML file the parser's defaults.

    Values go through the flags' own types, as on the command line: YAML reads `1e-4` as a string.

    Raises:
        ValueError: If the file is not a mapping, a key is no flag, or a value does not suit its flag.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config: there is no file {path}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; it must hold `flag: value` lines.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, impossible dates
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `flag: value` lines, but holds {type(values).__name__}.")
    actions = _actions(parser)
    names = {key: str(key).replace("-", "_") for key in values}
    if twice := [key for key, name in names.items() if list(names.values()).count(name) > 1]:
        raise ValueError(f"{path} sets {' and '.join(map(str, twice))}, which are the same flag. Keep one of the lines.")
    unknown = [key for key, name in names.items() if name not in actions]
    if unknown:
        raise ValueError(f"{path} has unknown keys: {', '.join(map(str, unknown))}{_near_misses(parser, names.values())}")
    for key, name in names.items():
        if values[key] is None:
            continue
        action = actions[name]
        try:
            parser.set_defaults(**{name: _convert(action, values[key])})
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            shown = f"{values[key]!r:.80}" if not isinstance(values[key], (list, dict)) else f"a {type(values[key]).__name__}"
            raise ValueError(f"{path}: {key}: {shown} does not suit --{name}: {error}") from None
        action.required = False


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    actions = {option: action for action in parser._actions for option in action.option_strings}
    return {
        option[2:]: action
        for option, action in actions.items()
        if action.dest not in ("help", "config") and "-" not in option[2:]
    }


def _convert(action: argparse.Action, value: Any) -> Any:
    convert: Any = action.type or str
    if isinstance(value, list) or action.nargs == "+":
        if action.nargs != "+":
            raise ValueError("it takes one value")
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (list, dict)) for item in items):
            raise ValueError("it takes values, not lists or mappings of them")
        return [convert(str(item)) for item in items]
    if isinstance(value, dict):
        raise ValueError("it takes a value, not a mapping")
    converted = convert(str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"choose from {', '.join(map(str, action.choices))}")
    return converted


def _near_misses(parser: argparse.ArgumentParser, names: Iterable[str]) -> str:
    known = list(_actions(parser))
    near = [match for name in names if name not in known for match in difflib.get_close_matches(name, known, n=2)]
    return f". Did you mean {', '.join(dict.fromkeys(near))}?" if near else f". Known are {', '.join(known)}."
