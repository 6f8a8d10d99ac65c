"""The export to a checkpoint that bitsandbytes loads in 4 bits."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..choices import QUANT_TYPES
from ..layers.find import loqt_layers
from ..layers.four_bit import declare_four_bit, four_bit_layer
from ..layers.layer import LoQTLayer
from .conversion import cast, convert_layers
from .report import Errors


def to_4bit(
    tuner: BaseTuner, adapter_name: str, dtype: torch.dtype | None = None, progressbar: bool = False
) -> Errors:
    """Turn `tuner.model` into a transformers model quantized by bitsandbytes, in place and layer by layer.

    The LoQT layers are quantized as the adapter's config says (`quantize_weight`, NF4 if that is `None`, and
    `double_quant`); all other layers stay as they are.

    Args:
        tuner (`BaseTuner`): A model with LoQT layers; they are used up.
        adapter_name (`str`): The adapter to merge.
        dtype (`torch.dtype`, *optional*):
            What the weights dequantize to, and of all other parameters. `None`: each as in the base model.
        progressbar (`bool`): Show one.
    """
    model, config = tuner.model, tuner.peft_config[adapter_name]
    quant_type = config.quantize_weight or QUANT_TYPES[0]
    compute_dtype = dtype or base_dtype(model, adapter_name)

    def convert(layer: LoQTLayer, weight: torch.Tensor) -> nn.Module:
        base_layer, own_dtype = layer.get_base_layer(), dtype or layer.weight_dtype
        return four_bit_layer(base_layer, weight, own_dtype, compute_dtype, quant_type, config.double_quant)

    errors = convert_layers(tuner, adapter_name, convert, progressbar)
    if dtype is not None:
        cast(model, dtype)
    declare_four_bit(model, quant_type, config.double_quant, compute_dtype)
    return errors


def base_dtype(model: nn.Module, adapter_name: str) -> torch.dtype:
    """Of the base weights under an adapter, as their first layer by name has it."""
    return min((name, layer.weight_dtype) for name, layer in loqt_layers(model) if adapter_name in layer.loqt_B)[1]
