"""A folder that runs the measurements on a machine without network: `make gpu-kit`, then `bash run.sh` in it.

    python -m benchmarks.gpu.kit

It holds the package, these measurements, the tests that they run, token ids, and wheels of what such a machine lacks. torch,
transformers and accelerate must be there.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .source import commit


ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 60 * 1024**2
# what is copied, and what of it stays behind
CONTENTS = (
    "loqt_peft",
    "benchmarks/common.py",
    "benchmarks/gpu",
    "examples/pretraining/configs",
    "tests",
    "pyproject.toml",
    "LICENSE",
)
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "fixtures", "peft_suite")
# of the versions in constraints.txt
WHEELS = ("peft", "bitsandbytes")
PLATFORMS = ("manylinux_2_24_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
# for training, and to judge it
DATA = ROOT / "examples" / "pretraining" / "data"
TEXTS = (DATA / "sotu_train.txt", DATA / "sotu_validation.txt")
VOCABULARY, LENGTH = 8192, 256

RUN = """#!/usr/bin/env bash
# Installs the wheels beside this file, without network, and measures; see docs/gpu.md. PYTHON says with which interpreter.
set -euo pipefail
cd "$(dirname "$0")"
python="${PYTHON:-python3}"
if [ ! -d site ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target site.partial wheels/*.whl
    mv site.partial site
fi
export PYTHONPATH="$PWD:$PWD/site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.gpu "$@"
"""


def pinned(package: str) -> str:
    """`name==version`, as in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.split(";")[0].strip() for line in lines if line.lower().startswith(f"{package}=="))


def download(package: str, folder: Path, python: str) -> Path:
    """Fetch a wheel for Linux on x86-64."""
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [
        "--python-version",
        python,
        "--implementation",
        "cp",
        *platforms,
        "--dest",
        str(folder),
        pinned(package),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob(f"{package}-*.whl"))


def strip_wheel(wheel: Path, out: Path, cuda: str) -> None:
    """Copy a wheel of bitsandbytes with the libraries for the CPU and one version of CUDA alone.

    Args:
        wheel (`Path`): As published.
        out (`Path`): The new file.
        cuda (`str`): Such as `"130"`.

    Raises:
        ValueError: If the wheel has no libraries for both.
    """
    wanted = {f"libbitsandbytes_{name}.so" for name in ("cpu", f"cuda{cuda}")}
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        libraries = [name for name in names if re.search(r"libbitsandbytes_\w+\.so$", name)]
        missing = wanted - {Path(name).name for name in libraries}
        if missing:
            raise ValueError(f"{wheel.name} holds no {', '.join(sorted(missing))}: it has {', '.join(libraries)}.")
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        rows = []
        for name in names:
            if name == record or (name in libraries and Path(name).name not in wanted):
                continue
            content = old.read(name)
            new.writestr(old.getinfo(name), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append((name, f"sha256={digest}", len(content)))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
        new.writestr(record, text.getvalue())


def write_tokens(texts: tuple[Path, Path], out: Path) -> dict[str, int]:
    """Write token ids, uint16 `[blocks, 256]` for "training" and "validation", of a text each.

    Returns:
        `dict[str, int]`: The numbers of blocks.

    Raises:
        ValueError: If a text does not fill a block.
    """
    # slow to import, and so is what it imports
    import torch
    from safetensors.torch import save_file

    from .settings import bpe_blocks

    lines = [text.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) for text in texts]
    parts = dict(zip(("training", "validation"), bpe_blocks(lines, VOCABULARY, LENGTH), strict=True))
    for text, blocks in zip(texts, parts.values(), strict=True):
        if not len(blocks):
            raise ValueError(f"{text} is too short: {LENGTH} tokens are needed.")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: blocks.to(torch.uint16).contiguous() for name, blocks in parts.items()}, out)
    return {name: len(blocks) for name, blocks in parts.items()}


def add_wheels(folder: Path, python: str, cuda: str) -> None:
    """Put the wheels into a folder."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        for package in WHEELS:
            wheel = download(package, Path(scratch), python)
            if package == "bitsandbytes":
                strip_wheel(wheel, folder / wheel.name, cuda)
            else:
                shutil.copy(wheel, folder)


def check_size(folder: Path, limit: int = LIMIT_BYTES) -> int:
    """Bytes of all files.

    Raises:
        ValueError: If they are more than the limit.
    """
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes, key=sizes.get)[-3:]
        listed = ", ".join(f"{path.relative_to(folder)} {sizes[path]}" for path in reversed(largest))
        raise ValueError(f"{folder} holds {total} bytes, more than the {limit} allowed; largest: {listed}.")
    return total


def make_kit(
    out: Path, texts: tuple[Path, Path] = TEXTS, python: str = "3.12", cuda: str = "130", wheels: bool = True
) -> int:
    """Make the folder anew.

    Args:
        out (`Path`): A folder; a kit that it holds is replaced.
        texts (`tuple[Path, Path]`): What token ids are made of, for training and for validation.
        python (`str`): Version of the machine's interpreter.
        cuda (`str`): Version of CUDA that its torch was built for.
        wheels (`bool`): Whether to fetch and add wheels.

    Returns:
        `int`: Bytes of all files.

    Raises:
        ValueError: If `out` is a folder of something else, a text is too short, or the kit is too large.
    """
    if out.exists() and any(out.iterdir()) and not (out / "kit.json").exists():
        raise ValueError(f"{out} is not empty, and no kit: choose another folder with --output.")
    shutil.rmtree(out, ignore_errors=True)
    for name in CONTENTS:
        source, target = ROOT / name, out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=LEFT_OUT)
        elif source.exists():
            shutil.copy(source, target)
    (out / "run.sh").write_text(RUN, encoding="utf-8")
    if wheels:
        add_wheels(out / "wheels", python, cuda)
    blocks = write_tokens(texts, out / "gpu_output" / "tokens.safetensors")
    about = {
        "commit": commit(),
        "texts": [text.name for text in texts],
        "blocks": blocks,
        "python": python,
        "cuda": cuda,
    }
    (out / "kit.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return check_size(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make gpu-kit", description="Make a folder to carry; see docs/gpu.md.")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu_kit", help="the folder (default: gpu_kit)")
    parser.add_argument(
        "--texts",
        type=Path,
        nargs=2,
        default=TEXTS,
        metavar=("TRAINING", "VALIDATION"),
        help="what LLaMA-60M learns, and what it is judged by (default: the embedded text)",
    )
    parser.add_argument("--python", default="3.12", help="the machine's Python (default: 3.12)")
    parser.add_argument("--cuda", default="130", help="the CUDA of the machine's torch (default: 130)")
    options = parser.parse_args()
    try:
        size = make_kit(options.output, tuple(options.texts), options.python, options.cuda)
    except ValueError as error:
        sys.exit(str(error))
    print(f"{options.output}: {size / 1024**2:.1f} MiB. Carry it, then: bash {options.output.name}/run.sh")


if __name__ == "__main__":
    main()
