"""The export to a checkpoint that bitsandbytes loads in 4 bits."""

from __future__ import annotations

import re

import bitsandbytes as bnb
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..algorithm.quantization import undo_cpu_packing
from ..choices import QUANT_TYPES
from ..layers.base_weight import source_class
from ..layers.find import loqt_layers
from .conversion import cast, convert_layers
from .report import Errors


def _4bit_layer(
    base_layer: nn.Module,
    weight: torch.Tensor,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    quant_type: str,
    double_quant: bool,
) -> bnb.nn.Linear4bit:
    """A `Linear4bit` with the bias of the base layer and a float32 weight `[out, in]`, to be dequantized to `dtype`."""
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=base_layer.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=double_quant,
            quant_type=quant_type,
        )
    layer.source_cls = source_class(base_layer)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double_quant, quant_type=quant_type, module=layer
    ).to(weight.device)
    layer.weight.quant_state.dtype = dtype
    layer.bias = base_layer.bias
    layer.train(base_layer.training)
    return layer


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
    names = {name for name, layer in loqt_layers(model) if adapter_name in layer.loqt_B}
    compute_dtype = dtype or model.get_submodule(min(names)).weight_dtype

    def convert(base_layer: nn.Module, weight: torch.Tensor, base_dtype: torch.dtype) -> nn.Module:
        return _4bit_layer(base_layer, weight, dtype or base_dtype, compute_dtype, quant_type, config.double_quant)

    errors = convert_layers(tuner, adapter_name, convert, progressbar)
    if dtype is not None:
        cast(model, dtype)
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
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[_skip_pattern(name, quantized) for name in skipped],
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization_config)
    model.is_quantized = True
    model.quantization_method = quantization_config.quant_method
    model.hf_quantizer.postprocess_model(model)
    return errors


def _skip_pattern(name: str, quantized: set[str]) -> str:
    # a plain name also stands for every name that ends with it
    if all(should_convert_module(other, [name]) for other in quantized):
        return name
    return f"^{re.escape(name)}$"
