"""The export to a dense model."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.tuners_utils import BaseTuner

from ..algorithm.quantization import undo_cpu_packing
from ..layers.base_weight import dense_layer
from .conversion import cast, convert_layers
from .report import Errors


def to_dense(
    tuner: BaseTuner, adapter_name: str, dtype: torch.dtype | None = None, progressbar: bool = False
) -> Errors:
    """Turn `tuner.model` into a dense transformers model, in place and layer by layer.

    Args:
        tuner (`BaseTuner`): A model with LoQT layers; they are used up.
        adapter_name (`str`): The adapter to merge.
        dtype (`torch.dtype`, *optional*): Of all parameters. `None`: each as in the base model.
        progressbar (`bool`): Show one.
    """
    model = tuner.model
    errors = convert_layers(
        tuner,
        adapter_name,
        lambda layer, weight: dense_layer(layer.get_base_layer(), weight, dtype or layer.weight_dtype),
        progressbar,
    )
    for name in [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]:
        layer = model.get_submodule(name)
        undo_cpu_packing(layer.weight)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        model.set_submodule(name, dense_layer(layer, weight, dtype or weight.dtype))
        layer.weight = None
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    if dtype is not None:
        cast(model, dtype)
    return errors
