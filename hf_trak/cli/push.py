"""`hf-trak push`: an index to a dataset repository of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_trak.cli.parsing import make_parser, name_positions, parse
from hf_trak.messages import say

_USAGE = "INDEX REPOSITORY [options]"
_DESCRIPTION = """\
Upload an index to a dataset repository in one commit. Only what the repository does not have is sent: after members were added,
those; after a broken connection, what had not arrived. Log in with `hf auth login`, or set HF_TOKEN.

examples:
  hf-trak push my-index me/sst2-trak --license cc-by-4.0
  hf-trak push my-index me/sst2-trak --create_pr
"""


@dataclass
class PushArguments:
    """What goes where."""

    index: str = field(metadata={"help": "Folder, dataset repository or object store URL of an index."})
    repo_id: str = field(metadata={"help": "The dataset repository, such as me/sst2-trak; made if need be."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to, made if need be; main by default."})
    create_pr: bool = field(default=False, metadata={"help": "Propose the commit as a pull request."})
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the training data, as the Hub spells it; by default, as stated in the card or by the training set."
        },
    )
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = make_parser([PushArguments], command="push", usage=_USAGE, description=_DESCRIPTION)
    return run(*parse(parser, name_positions(arguments, ["index", "repo_id"])))


def run(args: PushArguments) -> dict[str, Any]:
    """Push the index, say where it is, and return that."""
    from hf_trak.index import AttributionIndex

    url = AttributionIndex.from_pretrained(args.index).push_to_hub(
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        license=args.license,
        commit_message=args.commit_message,
    )
    if url is not None:
        say(f"Pushed: {url}")
    return {"url": url}
