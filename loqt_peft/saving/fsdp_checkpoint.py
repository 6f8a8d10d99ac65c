"""From a checkpoint of FSDP to one that the Trainer resumes from without it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers.trainer import OPTIMIZER_NAME

from .checkpoints import FSDP_OPTIMIZER, FSDP_PARTS, FSDP_WHOLE


def unshard_checkpoint(checkpoint: str | os.PathLike, output_dir: str | os.PathLike) -> str:
    """Write a checkpoint of FSDP2 as one for a single process or DDP, from which `train(resume_from_checkpoint=...)` goes on.

    The adapter, its seals, the schedule and the Trainer's state are copied; the optimizer's state, which FSDP keeps by the
    names of parameters, is written in the order in which the Trainer gives them to an optimizer.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder `checkpoint-<step>` that was saved with FULL_STATE_DICT.
        output_dir (`str` or `os.PathLike`): A new folder, `checkpoint-<step>` as well.

    Returns:
        `str`: `output_dir`.

    Raises:
        ValueError: If it is not such a checkpoint.
        FileExistsError: If `output_dir` exists.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if (checkpoint / FSDP_PARTS[0]).exists():
        raise ValueError(
            f"{str(checkpoint)!r} was saved with SHARDED_STATE_DICT, in parts. Resume from it under FSDP2, and save with "
            "FULL_STATE_DICT."
        )
    if not (checkpoint / FSDP_WHOLE).is_file() or not (checkpoint / FSDP_OPTIMIZER).is_file():
        raise ValueError(
            f"{str(checkpoint)!r} is not a checkpoint of FSDP with FULL_STATE_DICT: it lacks {FSDP_WHOLE} or {FSDP_OPTIMIZER}."
        )
    state = torch.load(checkpoint / FSDP_OPTIMIZER, map_location="cpu", weights_only=True)
    # before anything is written
    state = _by_number(state)
    output_dir.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name in (FSDP_WHOLE, FSDP_OPTIMIZER):
            continue
        if path.is_dir():
            shutil.copytree(path, output_dir / path.name)
        else:
            shutil.copy2(path, output_dir / path.name)
    torch.save(state, output_dir / OPTIMIZER_NAME)
    return str(output_dir)


def _by_number(state: dict) -> dict:
    """The state of an optimizer by the numbers of its parameters, from that by their names."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: values for name, values in state["state"].items()}, "param_groups": groups}
