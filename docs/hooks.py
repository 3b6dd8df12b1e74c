"""Pages of the documentation that are made when it is built: commands from their parsers, configuration from its fields.

`mkdocs build` calls `on_files`; `commands_page` and `configuration_page` need nothing but the package.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, fields
from html import unescape
from typing import Any


def command_section(command: str) -> str:
    """Return a command's usage, description and flags, as Markdown."""
    from hf_trak.cli.completion import parser_of

    parser = parser_of(command)
    lines = ["| flag | meaning | default |", "|---|---|---|"]
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        default = (
            ""
            if action.default is None or action.default is False or action.default == argparse.SUPPRESS
            else f"`{cell(str(action.default))}`"
        )
        lines.append(
            f"| `{action.option_strings[0]}` | {cell(action.help or '')} | {'required' if action.required else default} |"
        )
    description, _, examples = (parser.description or "").partition("examples:\n")
    shown = "\n".join(line.strip() for line in examples.strip().splitlines())
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    text = [f"## hf-trak {command}", " ".join(description.split()), f"```\n{usage}\n```"]
    return "\n\n".join([*text, *([f"```bash\n{shown}\n```"] if shown else []), "\n".join(lines)])


def cell(text: str) -> str:
    """Return a text as it may stand in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("%%", "%")


def commands_page() -> str:
    """Return the page of all commands."""
    from hf_trak.cli.evaluate import MEASURES
    from hf_trak.cli.main import COMMANDS

    names = [name for name in COMMANDS if name != "evaluate"] + [f"evaluate {name}" for name in MEASURES]
    table = ["| command | what it does |", "|---|---|"]
    table += [f"| [`hf-trak {name}`](#hf-trak-{name}) | {COMMANDS[name]} |" for name in COMMANDS if name != "evaluate"]
    table += [f"| [`hf-trak evaluate {name}`](#hf-trak-evaluate-{name}) | {text} |" for name, text in MEASURES.items()]
    intro = (
        "Every command takes `--config file.yaml`, a file of its flags without the dashes; flags on the command line win. Datasets are Parquet, "
        "CSV or JSON files, folders of them, or names on the Hub.\n\n"
        "Every command also takes, in any place:\n\n"
        "- `--json`: print one JSON document on standard output, with `command`, `exit_status`, `seconds`, `error` (a line, or null) and `result`, "
        "what was made and found; text for people goes to standard error. `hf-trak explore --json` prints it when the page is served.\n"
        "- `--quiet`: print errors and nothing else: no tables, no progress bars.\n"
        "- `--debug`, or `HF_TRAK_DEBUG=1`: show the traceback of an error.\n\n"
        "`HF_TRAK_VERBOSITY` is the least level of messages of the logger `hf_trak` that are shown: `debug`, `info`, `warning`, `error` or "
        '`critical`. In Python, it is set by `logging.getLogger("hf_trak").setLevel(...)`.\n\n'
        "| exit status | meaning |\n|---|---|\n"
        "| 0 | done |\n"
        "| 1 | an input was refused or something failed; one line says why |\n"
        "| 2 | bad usage: an unknown flag or command, a value that does not suit its flag |\n"
        "| 130 | interrupted with Ctrl-C; the same command goes on where it stopped |\n"
        "| 143 | terminated |"
    )
    return "\n\n".join(["# Commands", intro, "\n".join(table), *map(command_section, names)]) + "\n"


def configuration_page() -> str:
    """Return the page of all configuration fields."""
    from transformers import TrainingArguments

    from hf_trak import AttributionArguments, TrakConfig

    ours = {field.name for field in fields(AttributionArguments)} - {field.name for field in fields(TrainingArguments)}
    return (
        "\n\n".join(
            [
                "# Configuration",
                "## TrakConfig\n\nWhat features mean. An index stores it as `trak_config.json`, and queries are made with it.",
                fields_table(TrakConfig, {field.name for field in fields(TrakConfig)}),
                "## AttributionArguments\n\nAll arguments of transformers' `TrainingArguments`, and these. The flags of `hf-trak featurize` with the "
                "same names mean the same.",
                fields_table(AttributionArguments, ours),
                "## Environment variables",
                "| variable | meaning | default |\n|---|---|---|\n"
                "| `HF_TRAK_CACHE` | where hashes of verified files, and files fetched from object stores, are kept | `hf_trak` in `HF_HOME` |\n"
                "| `HF_TRAK_DEBUG` | 1 shows tracebacks of commands | 0 |\n"
                "| `HF_TRAK_PATIENCE` | seconds without a sign of life after which a process is given up by the others | 60 |\n"
                "| `HF_HUB_OFFLINE` | 1 uses only what is in the cache of `huggingface_hub` | 0 |",
            ]
        )
        + "\n"
    )


def fields_table(kind: type, names: set[str]) -> str:
    """Return the fields of a dataclass with their types, defaults and help, as a Markdown table."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(kind):
        if field.name in names:
            default = "" if field.default is MISSING else f"`{field.default!r}`"
            lines.append(
                f"| `{field.name}` | `{cell(str(field.type))}` | {cell(default)} | {cell(str(field.metadata.get('help', '')))} |"
            )
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, page in {"commands": commands_page, "configuration": configuration_page}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Take the brackets off names such as [`AttributionIndex`], which docstrings have as transformers' do, write types without marks, and make formulae MathML."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        return convert(unescape(match[2]), display="block" if match[1] == "div" else "inline")

    html = re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
    html = re.sub(r"<code>[^<]*(?:`|\*optional\*)[^<]*</code>", lambda match: re.sub(r"[`*]", "", match[0]), html)
    return re.sub(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', formula, html, flags=re.DOTALL)
