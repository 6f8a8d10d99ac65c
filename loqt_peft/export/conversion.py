"""LoQT layers, replaced one by one by layers that need nothing of this package."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..layers.find import loqt_layers
from ..layers.layer import LoQTLayer
from ..patience import patiently
from .report import Errors


def exported_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a converted layer as it computes with it, float32 `[out, in]`."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).float()


@torch.no_grad()
def convert_layers(
    tuner: BaseTuner,
    adapter_name: str,
    convert: Callable[[LoQTLayer, torch.Tensor], nn.Module],
    progressbar: bool,
    beside: Callable[[str], torch.Tensor | float] = lambda name: 0.0,
) -> Errors:
    """Replace each LoQT layer by `convert(layer, weight)`, then unwrap what else PEFT has wrapped.

    Args:
        tuner (`BaseTuner`): A model with LoQT layers; they are used up.
        adapter_name (`str`): The adapter to convert; layers without it get their base layer back.
        convert (`Callable`):
            Makes the new layer. `weight` is the whole weight, float32 `[out, in]`; what the layer holds itself is there still.
        progressbar (`bool`): Show one.
        beside (`Callable`): Name of a layer -> what is exported of its weight elsewhere, float32 `[out, in]`.
    """
    model, errors = tuner.model, Errors()
    # names only: a layer is freed once it is replaced
    for name in patiently([n for n, _ in loqt_layers(model)], "Converting layers", at_once=progressbar):
        layer = model.get_submodule(name)
        base_layer = layer.get_base_layer()
        if adapter_name not in layer.loqt_B:
            layer.base.restore(layer.compute_device)
            model.set_submodule(name, base_layer)
            continue
        weight = layer.effective_weight(adapter_name)
        if not torch.isfinite(weight).all():
            raise ValueError(f"The weight of {name!r} is not finite: the adapter is broken. Nothing was written.")
        # before the base weight is replaced
        change = None if layer.base.dropped else layer.get_delta_weight(adapter_name)
        converted = convert(layer, weight)
        errors.add(weight - exported_weight(converted) - beside(name), weight, change)
        model.set_submodule(name, converted)
        if converted is not base_layer:
            # a Params4bit and its Linear4bit hold each other
            base_layer.weight = None
    # of the tuner layers none is left: what it merges are the modules_to_save
    BaseTuner.merge_and_unload(tuner)
    # of a model on one device; transformers would take it for offloaded
    model.__dict__.pop("hf_device_map", None)
    return errors


@torch.no_grad()
def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring all floating parameters to one dtype."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
