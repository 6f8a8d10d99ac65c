"""The export to a checkpoint that bitsandbytes loads in 4 bits."""

from __future__ import annotations

import re

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..algorithm.quantization import undo_cpu_packing
from ..choices import QUANT_TYPES
from ..layers.base_weight import source_class
from ..layers.find import loqt_layers
from ..layers.layer import LoQTLayer
from .conversion import cast, convert_layers
from .report import Errors


def linear_4bit(
    layer: LoQTLayer,
    weight: torch.Tensor,
    compute_dtype: torch.dtype,
    quant_type: str,
    double_quant: bool,
    quant_state: QuantState | None = None,
) -> bnb.nn.Linear4bit:
    """A `Linear4bit` in place of a LoQT layer, with the bias of its base layer.

    Args:
        layer (`LoQTLayer`): Whose place it takes.
        weight (`torch.Tensor`): Floating `[out, in]`, to be quantized; or with `quant_state` codes, uint8 `[ceil(n / 2), 1]`.
        compute_dtype (`torch.dtype`): Of its products.
        quant_type (`str`): `"nf4"` or `"fp4"`.
        double_quant (`bool`): Whether the absmax is quantized too.
        quant_state (`QuantState`, *optional*): That of the codes.
    """
    base_layer = layer.get_base_layer()
    with torch.device("meta"):
        converted = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=base_layer.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=double_quant,
            quant_type=quant_type,
        )
    converted.source_cls = source_class(base_layer)
    converted.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_state=quant_state,
        compress_statistics=double_quant,
        quant_type=quant_type,
        module=converted,
        bnb_quantized=quant_state is not None,
    )
    if quant_state is None:
        # this quantizes it
        converted.weight = converted.weight.to(weight.device)
    else:
        converted.quant_state = quant_state
    converted.bias = base_layer.bias
    converted.train(base_layer.training)
    return converted


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
    compute_dtype = dtype or weight_dtype(model, adapter_name)

    def convert(layer: LoQTLayer, weight: torch.Tensor) -> nn.Module:
        converted = linear_4bit(layer, weight, compute_dtype, quant_type, config.double_quant)
        converted.weight.quant_state.dtype = dtype or layer.weight_dtype
        return converted

    errors = convert_layers(tuner, adapter_name, convert, progressbar)
    if dtype is not None:
        cast(model, dtype)
    say_4bit(model, compute_dtype, quant_type, config.double_quant)
    return errors


def weight_dtype(model: nn.Module, adapter_name: str) -> torch.dtype:
    """Of the base weights under an adapter, as their first layer by name has it."""
    return min((name, layer.weight_dtype) for name, layer in loqt_layers(model) if adapter_name in layer.loqt_B)[1]


def say_4bit(model: PreTrainedModel, compute_dtype: torch.dtype, quant_type: str, double_quant: bool) -> None:
    """Let the model's config say which of its layers are 4-bit ones of bitsandbytes, as transformers wants to know it."""
    quantized, skipped = set(), []
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            undo_cpu_packing(module.weight)
            quantized.add(name)
        elif type(module) in (nn.Linear, Conv1D):
            skipped.append(name)
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[_skip_pattern(name, quantized) for name in skipped],
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization_config)
    model.is_quantized = True
    model.quantization_method = quantization_config.quant_method
    model.hf_quantizer.postprocess_model(model)


def _skip_pattern(name: str, quantized: set[str]) -> str:
    # a plain name also stands for every name that ends with it
    if all(should_convert_module(other, [name]) for other in quantized):
        return name
    return f"^{re.escape(name)}$"
