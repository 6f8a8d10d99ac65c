"""The one place that knows whether a model is in order: what can go wrong with it, asked before it does."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import ParallelMode

from .config import LoQTConfig
from .findings import Finding
from .layers.find import active_layers, loqt_layers
from .layers.layer import LoQTLayer
from .layers.training_watch import HOW_TO_UPDATE, missing_updates_findings, never_updated_findings
from .layers.weight_shares import WeightShares, weight_shares
from .saving.base_name import base_name_findings
from .training.figures import SMALLEST_CHANGE_TO_ERROR
from .training.optimizer_state import optimizer_findings
from .training.sharding import unprepared_findings
from .training.zero import has_parts, zero_stage_findings


# whose versions a bug report needs
PACKAGES = ("loqt_peft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "trl")
REFUSED = {
    DistributedType.MEGATRON_LM: "Megatron-LM splits the layers that an update reads and writes",
}


# of TRL
AVERAGES = ("SyncRefModelCallback", "BEMACallback")


def averaging_findings(callbacks: Iterable[TrainerCallback]) -> list[Finding]:
    """Callbacks that average the parameters of two models, and nothing else of them."""
    return [
        Finding(
            "error",
            "averages_parameters",
            f"{type(callback).__name__} averages the parameters of two models, but of a LoQT adapter only B is one: after an "
            "update B belongs to another W and P, which it does not average.",
            "Leave it out (`sync_ref_model=False`).",
        )
        for callback in callbacks
        if any(base.__name__ in AVERAGES for base in type(callback).__mro__)
    ]


def _error(code: str, what: str, remedy: str) -> list[Finding]:
    return [Finding("error", code, what, remedy)]


###############################
# Of a live model
###############################


def trainer_findings(
    model: nn.Module,
    args: TrainingArguments,
    optimizer: torch.optim.Optimizer | None = None,
    callbacks: Iterable[TrainerCallback] = (),
) -> list[Finding]:
    """What would go wrong if the Trainer trained a model with its callback; asked when training begins.

    Args:
        model (`nn.Module`): What the Trainer was given.
        args (`TrainingArguments`): Its arguments.
        optimizer (`torch.optim.Optimizer`, *optional*): What it steps.
        callbacks: All that it calls.
    """
    if not any(isinstance(module, LoQTLayer) for module in model.modules()):
        return _error(
            "no_loqt_layers",
            "The model has no LoQT layers.",
            "Wrap it with `get_peft_model(model, LoQTConfig(...))` before giving it to the Trainer.",
        )
    adapter_name, layers = active_layers(model)
    if adapter_name is None:
        return _error(
            "nothing_trains",
            "No LoQT adapter is active and trainable.",
            "Activate one with `model.set_adapter(name)`, or load it with `is_trainable=True`.",
        )
    found = averaging_findings(callbacks) + _engine_findings(args)
    found += _argument_findings(args, layers, adapter_name)
    found += unprepared_findings(layer for _, layer in layers)
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        all_B = {name: layer.loqt_B[adapter_name] for name, layer in layers}
        missing = [name for name, B in all_B.items() if id(B) not in held and not has_parts(B)]
        if missing:
            found += _error(
                "optimizer_without_b",
                f"The optimizer does not hold B of {len(missing)} of {len(layers)} LoQT layers, e.g. {missing[0]}.",
                "Create it after `get_peft_model` and give it all trainable parameters.",
            )
        else:
            found += optimizer_findings(layers, adapter_name, optimizer)
    return found


def _engine_findings(args: TrainingArguments) -> list[Finding]:
    found = []
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        found += _error(
            "data_parallel",
            f"nn.DataParallel over {args.n_gpu} devices copies the layers, and what the copies capture is lost.",
            "Start the script with `torchrun` or `accelerate launch` (DDP), or set CUDA_VISIBLE_DEVICES to one device.",
        )
    distributed_type = AcceleratorState().distributed_type
    if distributed_type in REFUSED:
        found += _error(
            "engine_not_supported",
            f"{distributed_type.value} is not supported: {REFUSED[distributed_type]}.",
            "Use DDP.",
        )
    return found + zero_stage_findings(AcceleratorState().deepspeed_plugin)


def _argument_findings(
    args: TrainingArguments, layers: list[tuple[str, LoQTLayer]], adapter_name: str
) -> list[Finding]:
    found = []
    if args.auto_find_batch_size and any(layer.num_updates(adapter_name) for _, layer in layers):
        found += _error(
            "auto_find_batch_size",
            "auto_find_batch_size starts training again with weights that have already changed.",
            "Set per_device_train_batch_size instead.",
        )
    if args.optim_target_modules is not None:
        found += _error(
            "low_rank_optimizer",
            f"optim={args.optim!s} with optim_target_modules={args.optim_target_modules!r} is not allowed: GaLore and APOLLO "
            "make a low rank of the gradients of nn.Linear's weights, which LoQT has frozen, and do not see B, which is of "
            "low rank by itself.",
            "Use optim='adamw_torch' or 'adamw_bnb_8bit', without optim_target_modules.",
        )
    return found


def saving_findings(model: nn.Module, adapter_name: str) -> list[Finding]:
    """What is wrong with an adapter that is about to be saved or exported.

    Args:
        model (`nn.Module`): A model that holds the adapter.
        adapter_name (`str`): The adapter.
    """
    return never_updated_findings((layer for _, layer in _layers(model, adapter_name)), adapter_name)


def model_findings(model: nn.Module, adapter_name: str) -> list[Finding]:
    """What is wrong with an adapter in a model, whatever is to be done with it.

    Args:
        model (`nn.Module`): A model that holds the adapter.
        adapter_name (`str`): The adapter.
    """
    layers = _layers(model, adapter_name)
    try:
        for _, layer in layers:
            layer.verify(adapter_name)
    except ValueError as error:
        return _error(
            "not_verified", str(error), "Load an adapter that was saved whole, on the base that it was made for."
        )
    found = base_name_findings(model) + saving_findings(model, adapter_name)
    found += missing_updates_findings(layers[0][1], adapter_name)
    offloaded = [name for name, layer in layers if layer.get_base_layer().weight.is_meta]
    if offloaded:
        found += _error(
            "weights_on_meta",
            f"The base weights of {len(offloaded)} of {len(layers)} LoQT layers are on the meta device, e.g. {offloaded[0]}.",
            "Load the base model without offloading (`device_map`).",
        )
    return found + weight_shares(model, adapter_name).findings()


def _layers(model: nn.Module, adapter_name: str) -> list[tuple[str, LoQTLayer]]:
    return [(name, layer) for name, layer in loqt_layers(model) if adapter_name in layer.loqt_B]


###############################
# Of a run
###############################


def run_findings(folder: str | Path) -> list[Finding]:
    """What the logs of a run say, in its output directory or one of its checkpoints; nothing where there are none.

    Args:
        folder (`str` or `Path`): With the Trainer's `trainer_state.json`, or with checkpoints that have it.
    """
    states = [*Path(folder).glob(TRAINER_STATE_NAME), *Path(folder).glob(f"*/{TRAINER_STATE_NAME}")]
    if not states:
        return []
    state = max(
        (json.loads(path.read_text(encoding="utf-8")) for path in states), key=lambda state: state["global_step"]
    )
    logs, found = state["log_history"], []
    updates = [entry for entry in logs if "loqt/updates" in entry]
    if state["global_step"] and not updates:
        found.append(
            Finding(
                "warning",
                "run_without_updates",
                f"The run took {state['global_step']} steps, and its logs hold not one update.",
                f"{HOW_TO_UPDATE} Then train again.",
            )
        )
    ratios = [entry["loqt/change_to_error"] for entry in updates if "loqt/change_to_error" in entry]
    if ratios and ratios[-1] < SMALLEST_CHANGE_TO_ERROR:
        found.append(
            Finding(
                "warning",
                "change_lost_in_quantization",
                "At the last update quantizing the weights lost more than the update merged "
                f"(change_to_error={ratios[-1]:.2f}).",
                "A higher learning rate or loqt_alpha, a longer update_interval, or error_feedback=True helps.",
            )
        )
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    if losses and not math.isfinite(losses[-1]):
        found += _error(
            "loss_not_finite",
            f"The last loss is {losses[-1]}.",
            "Resume from an earlier checkpoint at a lower learning rate.",
        )
    return found


def saved_findings(config: LoQTConfig) -> list[Finding]:
    """What the config of a saved adapter tells.

    Args:
        config (`LoQTConfig`): As it was saved.
    """
    if config.num_updates or not config.init_weights:
        return []
    return [
        Finding(
            "warning",
            "never_updated",
            "The adapter has been through no update: its projection P is empty and its B zero, so it is the base model but "
            "for what full_rank_modules names.",
            f"If it was trained: {HOW_TO_UPDATE}",
        )
    ]


###############################
# The report
###############################


@dataclass(frozen=True)
class Health:
    """What was found.

    Attributes:
        versions (`dict[str, str]`): Of Python and of the packages that are installed.
        devices (`list[str]`): The processor, and each accelerator with its memory.
        adapter (`dict`, *optional*): Name, updates so far, rank, scale, formats, base model; `None` without an adapter.
        weights (`dict`, *optional*): How the model's weights are held, see [`loqt_peft.layers.weight_shares.WeightShares`].
        findings (`list[Finding]`): What is not in order; empty if nothing is.
    """

    versions: dict[str, str]
    devices: list[str]
    adapter: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def of(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, adapter_name: str | None = None
    ) -> Health:
        """The report on a live model, as for a bug report: `print(Health.of(model, optimizer))`.

        Args:
            model (`nn.Module`): A model with a LoQT adapter.
            optimizer (`torch.optim.Optimizer`, *optional*): What trains it.
            adapter_name (`str`, *optional*): The active adapter if `None`.
        """
        layers = dict(loqt_layers(model))
        names = {name for layer in layers.values() for name in layer.active_adapters if name in layer.loqt_B}
        adapter_name = adapter_name or next(iter(sorted(names)), None)
        if adapter_name is None or not _layers(model, adapter_name):
            missing = _error(
                "no_loqt_layers",
                "The model has no LoQT layers.",
                "Wrap it with `get_peft_model(model, LoQTConfig(...))`.",
            )
            return cls(versions(), devices(), findings=missing)
        found = model_findings(model, adapter_name)
        if optimizer is not None:
            found += optimizer_findings(_layers(model, adapter_name), adapter_name, optimizer)
        shares = weight_shares(model, adapter_name)
        return cls(versions(), devices(), _describe(model, adapter_name), _describe_shares(shares), found)

    @property
    def in_order(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> str:
        """The report for programs."""
        return json.dumps({"in_order": self.in_order, **asdict(self)}, indent=2)

    def __str__(self) -> str:
        sections = [("versions", self.versions), ("devices", dict(enumerate(self.devices)))]
        sections += [("adapter", self.adapter), ("weights", self.weights)]
        width = max(len(str(key)) for _, rows in sections for key in rows or ())
        lines = []
        for title, rows in sections:
            if rows:
                lines += [title, *(f"  {key!s:<{width}}  {value}" for key, value in rows.items()), ""]
        if self.in_order:
            return "\n".join([*lines, "to mend: nothing"])
        lines.append("to mend")
        for number, finding in enumerate(self.findings, 1):
            lines += [f"  {number}. {finding.severity}: {finding.what}", f"     {finding.remedy}"]
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of Python, the system and the packages of [`PACKAGES`] that are installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def devices() -> list[str]:
    """The processor, and each accelerator with its memory."""
    found = [f"cpu: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB")
    return found


def _describe(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    layers = _layers(model, adapter_name)
    first = layers[0][1]
    config = first.config[adapter_name]
    ranks = sorted({layer.r[adapter_name] for _, layer in layers})
    scales = sorted({layer.scaling[adapter_name] for _, layer in layers})
    updates = sorted({layer.num_updates(adapter_name) for _, layer in layers})
    return {
        "name": adapter_name,
        "base model": config.base_model_name_or_path,
        "layers": len(layers),
        "updates": _range(updates),
        "rank": _range(ranks),
        "scale": _range(scales),
        "W": _storage(config.quantize_weight, config.double_quant),
        "P": f"{_storage(config.quantize_projection, config.double_quant)}, {config.projection}",
        "full-rank modules": config.full_rank_modules or "none",
    }


def _range(values: list) -> str:
    shown = [f"{value:g}" for value in values]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _storage(quant_type: str | None, double_quant: bool) -> str:
    return "dense" if quant_type is None else quant_type + (", double-quantized" if double_quant else "")


def _describe_shares(shares: WeightShares) -> dict[str, str]:
    def row(count: int, largest: dict[str, int] | None = None) -> str:
        most = f", most of it in {next(iter(largest))}" if largest else ""
        return f"{count:,} ({100 * count / max(shares.total, 1):.1f}%){most}"

    return {
        "in 4 bits": row(shares.low_bit),
        "LoQT, not quantized": row(shares.low_rank_dense),
        "dense and frozen": row(shares.dense_frozen, shares.largest_dense_frozen),
        "trained at full rank": row(shares.full_rank, shares.largest_full_rank),
    }
