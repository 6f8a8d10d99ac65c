"""Which checkpoint of a run is complete."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME
from accelerate.utils.constants import OPTIMIZER_NAME as ACCELERATE_OPTIMIZER_NAME
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME
from transformers.utils import WEIGHTS_NAME as MODEL_WEIGHTS_NAME


logger = logging.getLogger(__name__)

# what accelerate writes under FSDP of model and optimizer: with FULL_STATE_DICT a file, with SHARDED_STATE_DICT a folder
FSDP_WHOLE, FSDP_OPTIMIZER = f"{FSDP_MODEL_NAME}.bin", f"{ACCELERATE_OPTIMIZER_NAME}.bin"
FSDP_PARTS = f"{FSDP_MODEL_NAME}_0", f"{ACCELERATE_OPTIMIZER_NAME}_0"
# what DeepSpeed writes into a checkpoint of the Trainer
DEEPSPEED_PARTS, DEEPSPEED_LATEST = "global_step*", "latest"


def get_last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest *complete* checkpoint in the output directory of a Trainer, for `train(resume_from_checkpoint=...)`.

    Where a process was killed while it saved, the newest directory is incomplete, and `resume_from_checkpoint=True` would
    take it. Here it is passed over, with a log message; nothing is deleted.

    Args:
        folder (`str` or `os.PathLike`): `TrainingArguments.output_dir`.

    Returns:
        `str` or `None`: Path of the checkpoint, if there is one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    found = []
    for path in folder.iterdir():
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    for _, path in sorted(found, reverse=True):
        reason = _incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("%s is not complete and is passed over: %s.", path, reason)
    return None


def _missing(checkpoint: Path) -> str | None:
    """What a checkpoint lacks for `resume_from_checkpoint`, which would go on without it, or from weights that are random."""
    if any((checkpoint / name).exists() for name in (FSDP_WHOLE, FSDP_PARTS[0])):
        return _missing_of_fsdp(checkpoint)
    # of several adapters each but "default" has a folder of its own
    adapters = [folder for folder in (checkpoint, *checkpoint.iterdir()) if (folder / CONFIG_NAME).is_file()]
    for folder in adapters:
        if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            return str((folder / SAFETENSORS_WEIGHTS_NAME).relative_to(checkpoint))
    # of a model in a wrapper that is neither PEFT's nor transformers' the Trainer saves all that there is
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, SAFE_WEIGHTS_NAME, MODEL_WEIGHTS_NAME)
    if not adapters:
        if any((checkpoint / name).is_file() for name in names[:2]):
            return CONFIG_NAME
        indices = [checkpoint / name for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)]
        if not any(path.is_file() for path in (*(checkpoint / name for name in names), *indices)):
            return SAFETENSORS_WEIGHTS_NAME
    # DeepSpeed keeps the optimizer's state in parts, and names their folder when all processes have written theirs
    optimizer_name = DEEPSPEED_LATEST if any(checkpoint.glob(DEEPSPEED_PARTS)) else OPTIMIZER_NAME
    return _missing_rest(checkpoint, optimizer_name)


def _missing_of_fsdp(checkpoint: Path) -> str | None:
    if (checkpoint / FSDP_WHOLE).is_file():
        return _missing_rest(checkpoint, FSDP_OPTIMIZER)
    # a folder gets its table of contents when all processes have written their parts
    contents = [f"{folder}/.metadata" for folder in FSDP_PARTS]
    missing = next((name for name in contents if not (checkpoint / name).is_file()), None)
    return missing or _missing_rest(checkpoint, FSDP_PARTS[1])


def _missing_rest(checkpoint: Path, optimizer_name: str) -> str | None:
    # with `save_only_model` there is none of these
    rest = {optimizer_name: optimizer_name, SCHEDULER_NAME: SCHEDULER_NAME, "rng_state.pth": "rng_state*.pth"}
    found = {name for name, pattern in rest.items() if next(checkpoint.glob(pattern), None)}
    return next((name for name in rest if found and name not in found), None)


def _incomplete(checkpoint: Path) -> str | None:
    # the Trainer writes its state last
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}"
    missing = _missing(checkpoint)
    if missing is not None:
        return f"it has no {missing}"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if path.name.endswith(".index.json"):
                    for shard in sorted(set(content["weight_map"].values())):
                        if not (path.parent / shard).is_file():
                            return f"it has no {shard}"
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth") or path.name in (FSDP_WHOLE, FSDP_OPTIMIZER):
                # torch writes zip files, whose table of contents is at the end; nothing is unpickled here
                with zipfile.ZipFile(path):
                    pass
        except (ValueError, SafetensorError, zipfile.BadZipFile, OSError) as error:
            return f"{path.name}: {error}"
    return None
