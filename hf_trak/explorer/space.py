"""An explorer that travels: a folder that runs by itself and as a Space of the Hub, with the index, its checkpoints and the rows."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_trak import __version__
from hf_trak.explorer.views import Explorer
from hf_trak.featurizing.identity import recorded_checkpoint, recorded_processor
from hf_trak.messages import markdown
from hf_trak.storage.files import write_atomically, write_folder, write_json
from hf_trak.tasks import TASKS

if TYPE_CHECKING:
    from gradio import Blocks

    from hf_trak.index import AttributionIndex

SPACE_NAME = "space.json"
_APP = '''"""The explorer of an attribution index, as `hf-trak explore --export` wrote it; space.json says what it shows."""

from pathlib import Path

from hf_trak.explorer.space import launch

launch(Path(__file__).parent)
'''
# Of a checkpoint, what loads it; no optimizer states, and nothing that is unpickled.
_OF_A_CHECKPOINT = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_PINNED = ("torch", "transformers", "tokenizers", "datasets")  # what features and their comparison depend on


def export_space(
    explorer: Explorer,
    folder: str | Path,
    *,
    models: Sequence[str] | None = None,
    processor: str | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write a folder with `app.py`, `requirements.txt`, `README.md` and what the explorer shows, and return it.

    An index, a checkpoint or a processor on the Hub is named; what is in a folder here is copied. So are the rows of the training and the
    validation set that were given, with all their columns.

    Args:
        models (`Sequence[str]`, *optional*): Checkpoints that the index was loaded with in place of the recorded ones.
        processor (`str`, *optional*): Processor that it was loaded with in place of the recorded one.
        measured (`Sequence[Mapping]`): Rows of results files, for the tab about the index.

    Raises:
        ValueError: If the folder has files, or the index needs code or models that a folder cannot hold.
    """
    index, folder = explorer.index, check_folder(folder)
    if index.config.task not in TASKS:
        raise ValueError(
            f"The index is of {index.config.task!r}, a task of your own, whose code it does not hold: a Space cannot run it."
        )
    checkpoints = list(models) if models is not None else _recorded(index)
    processor = processor if processor is not None else recorded_processor(index.folder, index.members[0].info)
    write_folder(folder)
    shown: dict[str, Any] = {"index": "index", "revision": None, "measured": [dict(row) for row in measured]}
    repository: Any = getattr(index, "_repository", None)
    if hasattr(repository, "repo_id"):
        shown |= {"index": repository.repo_id, "revision": repository.sha}
    else:
        index.save_pretrained(folder / "index")
    shown["models"] = None if checkpoints is None else [
        _copied(checkpoint, folder, f"models/{number}") for number, checkpoint in enumerate(checkpoints)
    ]  # fmt: skip
    shown["processor"] = None if processor is None else _copied(processor, folder, "processor")
    for name, rows in (("train", explorer.train), ("validation", explorer.validation)):
        shown[name] = None if rows is None else name
        if rows is not None:
            rows.with_format(None).save_to_disk(str(folder / name))
    write_json(folder / SPACE_NAME, shown)
    for name, text in (("app.py", _APP), ("requirements.txt", _requirements()), ("README.md", _card(explorer, shown))):
        write_atomically(folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return folder


def check_folder(folder: str | Path) -> Path:
    """Return a folder that an explorer may be exported to.

    Raises:
        ValueError: If it is there and has files.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not an empty folder. Choose another place: nothing is replaced.")
    return folder


def _recorded(index: AttributionIndex) -> list[str] | None:
    """Return the index's checkpoints in order; None if those that it records are on the Hub.

    Raises:
        ValueError: If it is of points of a path, of checkpoints in folders here.
    """
    plans = {plan.checkpoint: index.members[plan.members[0]] for plan in index.passes}
    found = [member.info["checkpoint"] for _, member in sorted(plans.items())]
    if all(checkpoint["path"] is None and checkpoint["repository"] is not None for checkpoint in found):
        return None
    if any("point" in member.identity for member in index.members):
        raise ValueError(
            "The index is of points of a path, whose checkpoints are in folders here. Push base and final model to the Hub, and make the index "
            "from there."
        )
    return [recorded_checkpoint(index.folder, checkpoint) for checkpoint in found]


def _copied(source: str, folder: Path, name: str) -> str:
    """Return a repository's name; of a folder here, what is needed to load it is copied, and the copy's place is returned."""
    if not Path(source).is_dir():
        return source
    place = folder / name
    write_folder(place)
    paths = {path for pattern in _OF_A_CHECKPOINT for path in Path(source).glob(pattern) if path.is_file()}
    if not paths:
        raise ValueError(f"{source} has no {', '.join(_OF_A_CHECKPOINT)} to copy. Save the model as safetensors.")
    for path in sorted(paths):
        shutil.copyfile(path, place / path.name)
    return name


def _requirements() -> str:
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in _PINNED]
    return "\n".join([f"hf-trak[explore]=={__version__}", *pinned]) + "\n"


def _card(explorer: Explorer, shown: Mapping[str, Any]) -> str:
    """Return the README with the header that a Space is configured by."""
    index = explorer.index
    header: dict[str, Any] = {
        "title": "hf_trak explorer",
        "emoji": "🔎",
        "colorFrom": "indigo",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "app_file": "app.py",
        "pinned": False,
        "tags": ["data-attribution", "hf_trak"],
    }
    if shown["revision"] is not None:
        header["datasets"] = [shown["index"]]
    repositories = {member.info["checkpoint"]["repository"] for member in index.members} - {None}
    if shown["models"] is None and repositories:
        header["models"] = sorted(repositories)
    lines = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    model = markdown(str(index.members[0].identity["model_class"]))
    return (
        f"---\n{lines}---\n\n# hf_trak explorer\n\nWhich of {index.n_rows:,} training rows made a {model} say what it says: an attribution index "
        f"of {len(index.members)} member{'s' * (len(index.members) > 1)}, to be asked about rows and texts.\n\n"
        "Run it here: `pip install -r requirements.txt && python app.py`.\n"
    )


def push_space(folder: str | Path, name: str, *, private: bool | None = None) -> str:
    """Upload an exported folder to a Space in one commit, and return its address. A new Space is made if need be.

    Raises:
        ValueError: If the folder is no exported explorer, or the Space is something else.
    """
    if not (Path(folder) / SPACE_NAME).is_file():
        raise ValueError(f"{folder} has no {SPACE_NAME}: it is no exported explorer.")
    from huggingface_hub import HfApi

    api = HfApi()
    made = api.create_repo(name, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    there = set(api.list_repo_files(made.repo_id, repo_type="space")) - {".gitattributes", "README.md"}
    if there and SPACE_NAME not in there:
        raise ValueError(
            f"The Space {name} holds {sorted(there)[0]!r} and no {SPACE_NAME}: it is another app, which is not replaced."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")  # it is
        api.upload_folder(
            folder_path=str(folder),
            repo_id=made.repo_id,
            repo_type="space",
            commit_message="Explorer of an attribution index",
            delete_patterns=["index/**", "models/**", "processor/**", "train/**", "validation/**"],
        )
    return str(made)


def load_space(folder: str | Path) -> Blocks:
    """Return the page of an exported folder. It writes nothing: decisions about labels are shown."""
    from datasets import Dataset

    from hf_trak.explorer.app import make_app
    from hf_trak.index import AttributionIndex

    folder = Path(folder)
    shown = json.loads((folder / SPACE_NAME).read_text(encoding="utf-8"))

    def here(name: str | None) -> str | None:
        return str(folder / name) if name is not None and (folder / name).is_dir() else name

    models = None if shown["models"] is None else [here(model) for model in shown["models"]]
    index = AttributionIndex.from_pretrained(
        here(shown["index"]) or "", revision=shown["revision"], models=models, processing_class=here(shown["processor"])
    )
    train, validation = (
        None if shown[name] is None else Dataset.load_from_disk(str(folder / shown[name])) for name in ("train", "validation")
    )
    return make_app(Explorer(index, train=train, validation=validation), None, measured=shown["measured"])


def launch(folder: str | Path) -> None:
    """Serve an exported folder until it is interrupted: on this machine alone, or as the Space that it runs in says."""
    from hf_trak.explorer.app import import_gradio, launch_options

    gr = import_gradio()
    load_space(folder).queue(default_concurrency_limit=1).launch(**launch_options(gr))
