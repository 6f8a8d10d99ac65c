"""An estimate's options as the command that predicts them and the code that trains so."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from ..advice import CASES
from .options import MemoryOptions


# name in `TrainingArguments` of an estimate's optimizer
OPTIM = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def command(model: str, options: MemoryOptions, budget: str | None = None) -> str:
    """The `loqt estimate` line of these options; those that are the default are left out.

    Args:
        model (`str`): As the command takes it.
        options ([`MemoryOptions`]): What is trained, and how.
        budget (`str`, *optional*): Memory of the device, as `"24GiB"`.
    """
    usual = MemoryOptions(method=options.method)
    parts = ["loqt", "estimate", shlex.quote(model)]
    for field in fields(MemoryOptions):
        value: Any = getattr(options, field.name)
        # the dtype of the adapter follows that of the weights
        default = {"adapter_dtype": options.dtype, "method": "loqt"}.get(field.name, getattr(usual, field.name))
        if value == default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parts += [f"--{flag}", str(value)]
    return " ".join([*parts, *(["--gpu", budget] if budget else [])])


def training_code(options: MemoryOptions) -> str:
    """The config and the Trainer's arguments of these options, for LoQT; scale and rate are those of `loqt_peft.advice`.

    With embeddings, norms and head that is pretraining, without them going on with a trained base.
    """
    advice = CASES["pretrain" if options.full_rank else "continue"]
    config = {"task_type": "CAUSAL_LM", "r": options.rank, "loqt_alpha": advice.scale}
    if options.full_rank:
        config["full_rank_modules"] = "all"
    if options.method == "loqt-nq":
        config |= {"quantize_weight": None, "quantize_projection": None}
    usual = MemoryOptions(method=options.method)
    for name in ("double_quant", "update_mode", "offload_gradients", "projection", "retain_base", "error_feedback"):
        if getattr(options, name) != getattr(usual, name):
            config[name] = getattr(options, name)
    arguments = {
        "output_dir": "out",
        "learning_rate": advice.learning_rate,
        "optim": OPTIM[options.optimizer],
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
    }
    if options.dtype == "bfloat16":
        arguments["bf16"] = True
    if options.gradient_checkpointing:
        arguments["gradient_checkpointing"] = True
    if options.per_layer:
        arguments["max_grad_norm"] = 0
    lines = [
        f"config = LoQTConfig({_keywords(config)})",
        "model = get_peft_model(model, config, autocast_adapter_dtype=False)"
        if options.adapter_dtype != "float32"
        else "model = get_peft_model(model, config)",
        f"args = TrainingArguments({_keywords(arguments)})",
    ]
    if options.per_layer:
        lines.append("# Trainer(..., optimizer_cls_and_kwargs=per_layer_optimizer(args))")
    return "\n".join(lines)


def _keywords(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_literal(value)}" for name, value in values.items())


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
