"""Leaving LoQT: dense, in 4 bits of bitsandbytes, in 4 bits with a LoRA adapter beside, or as a LoRA adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTuner

from .._moved import moved_names
from ..layers.find import loqt_layers
from .checks import (
    active_adapter,
    check_base_name,
    check_base_quantizer,
    check_loadable_in_4bit,
    check_output_dir,
    check_rank,
    check_ranks,
    model_files,
)
from .dense import to_dense
from .four_bit import to_4bit
from .lora import full_rank_owners, save_lora
from .qlora import BASE_FOLDER, save_qlora, to_qlora
from .report import ExportReport


__all__ = ["ExportReport", "check_base_name", "check_output_dir", "check_rank", "export", "to_4bit", "to_dense"]

__getattr__ = moved_names(__name__)


def export(
    tuner: BaseTuner,
    output_dir: str | Path,
    to: str,
    rank: int | float | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progressbar: bool = False,
    base_name: str | None = None,
) -> ExportReport:
    """See [`LoQTModel.export`]."""
    check_rank(to, rank)
    check_base_name(to, base_name)
    adapter_name = active_adapter(tuner)
    model, config = tuner.model, tuner.peft_config[adapter_name]
    sources = config.base_model_name_or_path, model.config.name_or_path
    output_dir = check_output_dir(output_dir, overwrite, sources)
    if to == "qlora":
        check_output_dir(output_dir / BASE_FOLDER, overwrite, sources)
    if to == "lora":
        check_ranks(model, adapter_name, rank)
        owners, biases = full_rank_owners(model, tuner.peft_config.values())
    else:
        check_base_quantizer(model)
    if to in ("bnb-4bit", "qlora"):
        check_loadable_in_4bit(model)

    ranks = {}
    layers = sum(adapter_name in layer.loqt_B for _, layer in loqt_layers(model))
    if to == "lora":
        _clear(output_dir)
        errors, ranks = save_lora(
            tuner, adapter_name, output_dir, rank, dtype or torch.float32, owners, biases, progressbar
        )
    elif to == "qlora":
        errors, lora_config, state = to_qlora(tuner, adapter_name, dtype, progressbar)
        ranks = {name: lora_config.rank_pattern.get(name, lora_config.r) for name in lora_config.target_modules}
        _clear(output_dir)
        _clear(output_dir / BASE_FOLDER)
        save_qlora(tuner, output_dir, lora_config, state, base_name)
    else:
        convert = to_dense if to == "dense" else to_4bit
        errors = convert(tuner, adapter_name, dtype, progressbar)
        _clear(output_dir)
        model.save_pretrained(output_dir)
    return errors.report(to, output_dir, layers, ranks)


def _clear(output_dir: Path) -> None:
    for file in list(model_files(output_dir)):
        file.unlink()
