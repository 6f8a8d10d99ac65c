"""The files of a checkpoint, looked at before anything is read of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open


class Source(NamedTuple):
    """Where a tensor is read from.

    Attributes:
        file (`str`): Path of the file.
        dtype (`str`): As the file's header has it, `"BF16"` for instance.
    """

    file: str
    dtype: str


def sources(files: Sequence[str]) -> dict[str, Source]:
    """Name of each tensor of a checkpoint -> where it is read from.

    Args:
        files (`Sequence[str]`): Paths of its safetensors files.

    Raises:
        ValueError:
            If a file is no safetensors file, is truncated, has a damaged header, or lacks a tensor that the checkpoint's
            index says it has. It names the file.
    """
    held: dict[str, Source] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"{file!r} cannot be packed as it is read: only safetensors files can, of which one tensor can be read at a "
                "time. Save the model anew with `save_pretrained`, or load it and use `loqt_peft.pack_model`."
            )
        try:
            with safe_open(file, "pt") as opened:
                found = {name: Source(file, opened.get_slice(name).get_dtype()) for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The checkpoint's file {file!r} is truncated or damaged: {error}. Download it anew."
            ) from error
        lacking = sorted(_expected(Path(file)) - found.keys())
        if lacking:
            shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
            raise ValueError(f"The checkpoint's file {file!r} lacks what the index says it holds: {shown}.")
        held |= found
    return held


def _expected(file: Path) -> set[str]:
    """The tensors that the index beside a file says it holds."""
    expected: set[str] = set()
    for index in file.parent.glob("*.safetensors.index.json"):
        places = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        expected |= {name for name, place in places.items() if place == file.name}
    return expected
