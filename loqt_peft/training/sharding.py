"""FSDP2: what is done with a model before `fully_shard` gets it, and whether its processes agree."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from ..compat import SHARDS_INTEGERS
from ..dtensor import is_sharded_tensor
from ..findings import Finding, report
from ..layers.find import loqt_layers
from ..layers.layer import LoQTLayer
from ..layers.sharded import make_shardable
from ..saving.seal import checksum


if dist.is_available():
    from torch.distributed.fsdp import FSDPModule


def prepare_model_for_fully_shard(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Make `torch.distributed.fsdp.fully_shard` shard W and P of a model's LoQT layers as it shards B.

    With the Trainer [`~loqt_peft.LoQTTrainerCallback`] does so. In a loop of your own, on all processes:

    ```py
    model = get_peft_model(model, LoQTConfig(...))
    prepare_model_for_fully_shard(model, device)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ```

    W is quantized now, before the first step rather than in it, so that the layers compute with the quantized weight from
    the start. Of the original weights each process keeps one part, on its host; the first switch compensates against them.
    Disabling, merging, deleting or adding an adapter is impossible from now on.

    Args:
        model (`nn.Module`): A model with LoQT layers, whole on every process. It is changed in place.
        device (`torch.device`, *optional*): Where W is quantized, layer by layer; where the weights lie if `None`.

    Returns:
        `nn.Module`: The model.

    Raises:
        ValueError: Before anything is changed: if processes hold other tensors, the model is sharded already, or a setting
            of the adapter is not allowed.
    """
    layers = [layer for _, layer in loqt_layers(model) if not layer.base.is_sharded]
    for layer in layers:
        for adapter_name in layer.loqt_B:
            layer.verify(adapter_name)
    report([*unprepared_findings(layers), *adapter_findings(layers), *agreement_findings(model)], stacklevel=3)
    for layer in layers:
        make_shardable(layer, device)
    return model


def reshard(model: nn.Module) -> None:
    """Put the parts in place of what a forward pass has gathered and kept: what is written to that is lost."""
    if dist.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


###############################
# Checks
###############################


def unprepared_findings(layers: Iterable[LoQTLayer]) -> list[Finding]:
    """Whether a model was sharded without preparing it: W and P are whole on every process, and B cannot be updated."""
    unprepared = (layer for layer in layers if not layer.base.is_sharded)
    sharded = [
        layer
        for layer in unprepared
        if any(is_sharded_tensor(tensor) for tensor in (*layer.loqt_B.values(), layer.base.layer.weight))
    ]
    if not sharded:
        return []
    return [
        Finding(
            "error",
            "sharded_unprepared",
            f"{len(sharded)} LoQT layers were sharded (FSDP2, or tensor parallel) before LoQT knew of it.",
            "Pass LoQTTrainerCallback to the Trainer when it is made (`callbacks=[...]`); in a loop of your own, call "
            "`prepare_model_for_fully_shard(model)` before `fully_shard`. Load the base model whole.",
        )
    ]


def adapter_findings(layers: Iterable[LoQTLayer]) -> list[Finding]:
    """Settings of an adapter that sharding does not allow."""
    configs = {name: config for layer in layers for name, config in layer.config.items()}
    found = [
        Finding(
            "error",
            "integers_not_sharded",
            f"torch {torch.__version__} cannot shard W and P in 4 bits, as adapter {name!r} has them.",
            "Install torch 2.13 or a later one, or set quantize_weight=None and quantize_projection=None.",
        )
        for name, config in configs.items()
        if not SHARDS_INTEGERS and (config.quantize_weight or config.quantize_projection)
    ]
    return found + [
        Finding(
            "error",
            "error_feedback_sharded",
            f"error_feedback=True of adapter {name!r} is not allowed under FSDP2: what quantizing leaves over would lie whole "
            "on the host of every process.",
            "Set error_feedback=False, or train with DDP.",
        )
        for name, config in configs.items()
        if config.error_feedback
    ]


def agreement_findings(model: nn.Module) -> list[Finding]:
    """Whether all processes hold the same adapters and trained parameters, on the same base; all must ask.

    Sharded, a process would take its parts of one model, and its neighbour those of another.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return []
    own = {name: checksum(p) for name, p in model.named_parameters() if p.requires_grad and not is_sharded_tensor(p)}
    for name, layer in loqt_layers(model):
        if layer.base.is_sharded:
            continue
        own[f"{name}.base_layer"] = checksum(layer.base_sample()[1])
        for part in ("loqt_P", "loqt_weight", "loqt_state"):
            own |= {f"{name}.{part}.{key}": checksum(tensor) for key, tensor in getattr(layer, part).items()}
    found: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    names = sorted({name for other in found for name in other})
    unlike = [name for name in names if len({other.get(name) for other in found}) > 1]
    if not unlike:
        return []
    return [
        Finding(
            "error",
            "processes_disagree",
            f"{len(unlike)} of {len(names)} tensors differ between the processes, e.g. {', '.join(unlike[:3])}.",
            "Load the same model and the same adapter in all of them; of a new adapter with random weights "
            "(init_weights=False), set the same seed before `get_peft_model`.",
        )
    ]
