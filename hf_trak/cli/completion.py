"""`hf-trak completion`: what makes a shell complete commands, flags and files."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

from hf_trak.cli.main import COMMANDS, OneLineErrors
from hf_trak.cli.parsing import actions_of

SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")
_FILES = {
    "base", "config", "data", "dataset", "export", "fixed", "ground_truth", "image", "index", "messages", "model", "output", "processor", "queries",
    "report", "results", "scores", "target", "train", "validation",
}  # fmt: skip
_DESCRIPTION = """\
Print a script that makes a shell complete commands, flags, choices and files. Needs pip install 'hf-trak[completion]'.

examples:
  hf-trak completion bash > ~/.local/share/bash-completion/completions/hf-trak
  hf-trak completion zsh > ~/.zfunc/_hf-trak       (a folder of fpath)
  hf-trak completion fish > ~/.config/fish/completions/hf-trak.fish
"""


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = OneLineErrors(
        prog="hf-trak completion",
        usage="hf-trak completion SHELL",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    shell = parser.parse_args(list(arguments)).shell
    try:
        import shtab
    except ImportError as error:
        raise ImportError("Completion needs shtab: pip install 'hf-trak[completion]'.") from error
    script = shtab.complete(whole_parser(), shell)
    print(script)
    return {"shell": shell, "script": script}


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser that prints the help of a command, such as "featurize" or "evaluate lds"."""
    found: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.print_help
    argparse.ArgumentParser.print_help = lambda parser, file=None: found.append(parser)  # type: ignore[method-assign, assignment]
    name, *rest = command.split()
    try:
        with contextlib.suppress(SystemExit):
            importlib.import_module(f"hf_trak.cli.{name.replace('-', '_')}").main([*rest, "--help"])
    finally:
        argparse.ArgumentParser.print_help = original  # type: ignore[method-assign]
    (parser,) = found
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser that has all commands as its own, for shtab alone."""
    from hf_trak.cli.evaluate import MEASURES

    whole = argparse.ArgumentParser(prog="hf-trak", add_help=False)
    _add_shared(whole)
    whole.add_argument("--version", action="store_true", help="show the version")
    commands = whole.add_subparsers()
    for name, text in COMMANDS.items():
        parser = commands.add_parser(name, help=text, add_help=False)
        if name == "evaluate":
            measures = parser.add_subparsers()
            for measure, meaning in MEASURES.items():
                _copy(parser_of(f"evaluate {measure}"), measures.add_parser(measure, help=meaning, add_help=False))
        else:
            _copy(parser_of(name), parser)
    return whole


def _copy(source: argparse.ArgumentParser, target: argparse.ArgumentParser) -> None:
    """Give a parser the flags of another, and those of every command."""
    import shtab

    for action in actions_of(source):
        if action.dest in _FILES and action.choices is None:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        target._add_action(action)
    _add_shared(target)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quiet", action="store_true", help="print errors and nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
