"""`hf-trak verify`: whether every file of an index is what was written, and how to mend those that are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_trak.cli.parsing import make_parser, name_positions, parse
from hf_trak.messages import mask_secrets, say

_USAGE = "INDEX [options]"
_DESCRIPTION = """\
Hash every file of an index, check what each says of itself, and list the damaged ones with how to mend them. The exit status is 1 if
any is damaged. To mend a local index, run the `hf-trak featurize` command that made it again: it makes only the missing and damaged
files, with the same bytes.

examples:
  hf-trak verify my-index
  hf-trak verify me/sst2-trak --revision main --json       (lists every file)
"""


@dataclass
class VerifyArguments:
    """Which index."""

    index: str = field(metadata={"help": "Folder, dataset repository or object store URL of an index."})
    revision: str | None = field(default=None, metadata={"help": "Revision of an index repository."})


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = make_parser([VerifyArguments], command="verify", usage=_USAGE, description=_DESCRIPTION)
    return run(*parse(parser, name_positions(arguments, ["index"])))


def run(args: VerifyArguments) -> dict[str, Any]:
    """Verify, say what was found, and return every file.

    Raises:
        DamagedIndex: If a file is damaged or missing.
    """
    from hf_trak.config import CHOSEN_FOR_SCORES, CONFIG_NAME, TrakConfig
    from hf_trak.storage.verify import verify_index

    folder, fetch, mend = _open(args)
    findings = list(verify_index(folder, fetch, **({} if mend is None else {"mend": mend})))
    damaged = [finding for finding in findings if finding.is_damage]
    n_bytes = sum(finding.bytes for finding in findings)
    files = [finding._asdict() for finding in findings]
    result = {"index": mask_secrets(args.index), "whole": not damaged, "bytes": n_bytes, "files": files}
    for finding in findings:
        if finding.problem:
            say(f"{finding.file}: {finding.state}: {finding.problem}\n    {finding.mend}")
    if damaged:
        named = ", ".join([finding.file for finding in damaged[:3]] + ["..."] * (len(damaged) > 3))
        raise DamagedIndex(
            f"{len(damaged)} of {len(findings)} files of {mask_secrets(args.index)} are damaged or missing: {named}", result
        )
    whole = [finding for finding in findings if finding.state == "whole"]
    say(f"{mask_secrets(args.index)}: {len(whole):,} files, {n_bytes:,} bytes: all are what was written.")
    config = TrakConfig.from_pretrained(folder)
    chosen = [f"{name} {getattr(config, name)}" for name in CHOSEN_FOR_SCORES if getattr(config, name) is not None]
    say(f"Scores go by {CONFIG_NAME}: {', '.join(chosen)}. These may be edited, so no file is held against them.")
    return result


class DamagedIndex(ValueError):
    """Files are not what was written; `result` lists all files."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def _open(args: VerifyArguments) -> tuple[Path, Callable[[str], Any] | None, str | None]:
    """Return the folder that files are in or come to, what brings them, and how to mend files there."""
    from hf_trak.hub.download import HubIndex
    from hf_trak.hub.object_index import ObjectIndex
    from hf_trak.storage.object_store import ObjectPath, place
    from hf_trak.storage.replacing import finish_replacement

    folder = place(args.index)
    if isinstance(folder, ObjectPath):
        index = ObjectIndex.open(folder)
        return (
            index.folder,
            index.fetch,
            "Delete that object, and run the command that made the index again: it makes that file again.",
        )
    if folder.exists():
        if args.revision is not None:
            raise ValueError(f"--revision is for repositories, but {folder} is a folder.")
        finish_replacement(folder)
        return folder, None, None
    hub = HubIndex.open(args.index, args.revision)
    return (
        hub.folder,
        hub.fetch,
        "It is damaged in the repository or in the cache. Run `hf cache rm` for it, or ask for it to be pushed again.",
    )
