"""What travels to a machine with a GPU and no network: wheels for its Python, and CIFAR-2 where it is given.

    python benchmarks/gpu_parcel.py --folder parcel --limit_mib 57
    python benchmarks/gpu_parcel.py --folder parcel --cifar2 shared/data/cifar2 --no_wheels

The machine has torch for CUDA, transformers, accelerate, peft and pytest; `gpu_day.sh` installs the rest from WHEELS=parcel/wheels. The
sources of fast_jl are compiled there. Prints what the parcel weighs, and fails if that is more than the limit.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

WHEELS = ("pyarrow", "datasets", "dill", "multiprocess", "beartype")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")
FAST_JL = "fast_jl==0.1.3"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="of the machine")
    parser.add_argument("--cifar2", type=Path, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--no_wheels", action="store_true")
    parser.add_argument("--limit_mib", type=float, default=64.0)
    return parser.parse_args()


def requirement(name: str) -> str:
    """Return the version that this environment or constraints.txt has, so that both machines run the same."""
    pinned = Path(__file__).parents[1] / "constraints.txt"
    found = re.search(rf"^{name}==\S+", pinned.read_text(), re.MULTILINE)
    return found.group() if found else name


def download(folder: Path, python: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    platforms = [flag for platform in PLATFORMS for flag in ("--platform", platform)]
    binary = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    subprocess.run([*pip, *binary, *map(requirement, WHEELS)], check=True)
    # Not by pip, which would run its setup, which needs torch built for CUDA.
    name, version = FAST_JL.split("==")
    request = urllib.request.Request(
        f"https://pypi.org/simple/{name.replace('_', '-')}/",
        headers={"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.1"},
    )
    with urllib.request.urlopen(request) as answer:
        page = answer.read().decode()
    link = re.search(rf'https://[^"]+/({name}-{version}\.tar\.gz)', page)
    digest = re.search(rf"{name}-{version}\.tar\.gz.{{0,400}}?sha256\W+([0-9a-f]{{64}})", page, re.DOTALL)
    if link is None or digest is None:
        raise SystemExit(f"The registry has no sources of {FAST_JL}.")
    with urllib.request.urlopen(link.group()) as answer:
        archive = answer.read()
    if hashlib.sha256(archive).hexdigest() != digest.group(1):
        raise SystemExit(f"What was downloaded from {link.group()} is not what the registry says it is. Try again.")
    (folder / link.group(1)).write_bytes(archive)


def main() -> None:
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not options.no_wheels:
        download(options.folder / "wheels", options.python)
    if options.cifar2:
        (options.folder / "cifar2").mkdir(exist_ok=True)
        for name in ("train.parquet", "test.parquet"):
            shutil.copyfile(options.cifar2 / name, options.folder / "cifar2" / name)
    files = [path for path in options.folder.rglob("*") if path.is_file()]
    weight = sum(path.stat().st_size for path in files) / 2**20
    for path in sorted(files):
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.relative_to(options.folder)}")
    print(f"{weight:7.2f} MiB in all, of {options.limit_mib:g}")
    if weight > options.limit_mib:
        raise SystemExit("The parcel is too heavy.")


if __name__ == "__main__":
    main()
