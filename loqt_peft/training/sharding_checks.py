"""Whether the Trainer and accelerate shard a model in a way that LoQT can be updated in; asked before anything is sharded."""

from __future__ import annotations

import os
import re

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..findings import Finding


# of torchao
_TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
# of bitsandbytes, by their names in `TrainingArguments.optim`
_BITSANDBYTES = re.compile(r"bnb|paged|lion|ademamix|^adamw_8bit$")


def is_fsdp() -> bool:
    """Whether accelerate shards what it prepares."""
    return AcceleratorState().distributed_type == DistributedType.FSDP


def engine_findings(model: nn.Module, args: TrainingArguments) -> list[Finding]:
    """What of a Trainer's settings would go wrong with LoQT layers, or is not what was asked for.

    Args:
        model (`nn.Module`): What the Trainer was given.
        args (`TrainingArguments`): Its arguments.
    """
    found = _parallelism_findings(model, args)
    if not is_fsdp():
        return found + _inactive_findings(args)
    plugin = AcceleratorState().fsdp_plugin
    if plugin.fsdp_version != 2:
        return found + [
            Finding(
                "error",
                "fsdp1",
                "FSDP1 (fsdp_version=1) flattens all parameters of a block into one, where an update finds neither B nor W.",
                "Use FSDP2: `fsdp_version: 2` in accelerate's config, or fsdp_config={'version': 2} of the Trainer.",
            )
        ]
    return found + _plugin_findings(plugin) + _optimizer_findings(plugin, args) + _dtype_findings(model)


def _inactive_findings(args: TrainingArguments) -> list[Finding]:
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or bool(args.fsdp)
    if not asked:
        return []
    return [
        Finding(
            "warning",
            "fsdp_not_active",
            f"FSDP was asked for, and is not active: accelerate has set up {AcceleratorState().distributed_type.value}, as it "
            "does without a word on CPUs and with a single process. Each process holds the whole model.",
            "Start several processes (`accelerate launch`) on accelerators, or ask for DDP.",
        )
    ]


def _parallelism_findings(model: nn.Module, args: TrainingArguments) -> list[Finding]:
    config = getattr(args, "parallelism_config", None)
    kinds = [
        name
        for name, flag in (("tensor", "tp_enabled"), ("context", "cp_enabled"), ("sequence", "sp_enabled"))
        if getattr(config, flag, False)
    ]
    if getattr(model, "_tp_size", None) not in (None, 1) and "tensor" not in kinds:
        kinds.insert(0, "tensor")
    return [
        Finding(
            "error",
            f"{kind}_parallel",
            f"{kind.capitalize()} parallelism is not supported: each process would have a part of a layer, or of its input, "
            "and so a part of the gradient that P is made from.",
            "Shard with FSDP2 (`dp_shard_size`, `dp_replicate_size`), or use DDP.",
        )
        for kind in kinds
    ]


def _plugin_findings(plugin) -> list[Finding]:
    if not plugin.cpu_ram_efficient_loading:
        return []
    return [
        Finding(
            "error",
            "cpu_ram_efficient_loading",
            "fsdp_cpu_ram_efficient_loading=True is not allowed: it leaves the weights of all processes but the first empty, "
            "and W has to be quantized from them.",
            "Set it to false. Each process then loads the whole base model, for which its host needs room.",
        )
    ]


def _optimizer_findings(plugin, args: TrainingArguments) -> list[Finding]:
    name = getattr(args.optim, "value", args.optim)
    if _BITSANDBYTES.search(name):
        return [
            Finding(
                "error",
                "bitsandbytes_optimizer_sharded",
                f"optim={name!r} is not allowed under FSDP2: the operations of bitsandbytes' optimizers do not know sharded "
                "parameters.",
                "Use optim='adamw_torch_8bit' (torchao), 'adamw_torch' or 'adamw_torch_fused'.",
            )
        ]
    saves = args.save_strategy != SaveStrategy.NO and not args.save_only_model
    if name in _TORCHAO and saves and plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
        return [
            Finding(
                "error",
                "torchao_optimizer_whole",
                f"optim={name!r} with FULL_STATE_DICT is not allowed: torch cannot hand the quantized moments of such a "
                "checkpoint to the processes again, so that the run could not be resumed.",
                "Set fsdp_state_dict_type to SHARDED_STATE_DICT.",
            )
        ]
    return []


def _dtype_findings(model: nn.Module) -> list[Finding]:
    # accelerate casts them to float32 for mixed precision
    if AcceleratorState().mixed_precision != "no":
        return []
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) < 2:
        return []
    return [
        Finding(
            "error",
            "trained_dtypes_sharded",
            f"What is trained has several dtypes ({', '.join(sorted(map(str, dtypes)))}), and FSDP2 takes one in a block.",
            "Train in mixed precision (bf16=True), or load the base model in float32.",
        )
    ]
