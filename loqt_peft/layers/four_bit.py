"""A linear layer in 4 bits as bitsandbytes has it, and a model of such layers, with the very codes of an adapter's own W."""

from __future__ import annotations

import re

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..algorithm.precision import plain_defaults
from ..algorithm.quantization import FourBitFormat, undo_cpu_packing
from .base_weight import source_class


def empty_four_bit_layer(
    base_layer: nn.Module, shape: tuple[int, int], compute_dtype: torch.dtype, quant_type: str, double_quant: bool
) -> bnb.nn.Linear4bit:
    """A `Linear4bit` for a linear layer, with its bias; its weight is a `meta` tensor that is not quantized yet.

    Args:
        base_layer (`nn.Module`): `nn.Linear`, `Conv1D` or `Linear4bit`.
        shape (`tuple[int, int]`): `[out, in]`.
        compute_dtype (`torch.dtype`): In which the product is computed.
        quant_type (`str`): `"nf4"` or `"fp4"`.
        double_quant (`bool`): Whether the absmax is quantized to 8 bits too.
    """
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            shape[1],
            shape[0],
            bias=base_layer.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=double_quant,
            quant_type=quant_type,
        )
    layer.source_cls = source_class(base_layer)
    layer.bias = base_layer.bias
    layer.train(base_layer.training)
    return layer


@torch.no_grad()
def pack_weight(layer: bnb.nn.Linear4bit, matrix: torch.Tensor, dtype: torch.dtype | None = None) -> bnb.nn.Params4bit:
    """The weight of a `Linear4bit`, quantized by the layer's settings; the layer is told of its quantization state.

    Args:
        layer (`bnb.nn.Linear4bit`): Its weight stays as it is.
        matrix (`torch.Tensor`): Floating `[out, in]`, on the device where the weight is to lie.
        dtype (`torch.dtype`, *optional*): What the weight dequantizes to; that of `matrix` if `None`.
    """
    quant_type, double_quant = layer.weight.quant_type, layer.weight.compress_statistics
    storage = FourBitFormat(tuple(matrix.shape), quant_type, double_quant)
    return packed_weight(layer, storage, storage.pack(matrix), dtype or matrix.dtype)


def packed_weight(
    layer: bnb.nn.Linear4bit, storage: FourBitFormat, packed: torch.Tensor, dtype: torch.dtype
) -> bnb.nn.Params4bit:
    """The weight of a `Linear4bit` with the very codes and absmax of a packed matrix, in memory of its own.

    Args:
        layer (`bnb.nn.Linear4bit`): Is told of the quantization state; its weight stays as it is.
        storage (`FourBitFormat`): How the matrix `[out, in]` is packed.
        packed (`torch.Tensor`): uint8, as `storage` packs it.
        dtype (`torch.dtype`): What the weight dequantizes to.
    """
    quant_type, double_quant = storage.quant_type, storage.double_quant
    parts = storage.parts(packed)
    with plain_defaults():
        code = get_4bit_type(quant_type, device=packed.device)
    state = QuantState(
        absmax=parts["absmax"],
        shape=torch.Size(storage.shape),
        code=code,
        blocksize=storage.blocksize,
        quant_type=quant_type,
        dtype=dtype,
        offset=parts.get("offset"),
        state2=storage.nested_state(parts.get("nested_absmax")),
    )
    layer.quant_state = state
    return bnb.nn.Params4bit(
        parts["codes"].view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        module=layer,
        bnb_quantized=True,
    )


def four_bit_layer(
    base_layer: nn.Module,
    weight: torch.Tensor,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    quant_type: str,
    double_quant: bool,
) -> bnb.nn.Linear4bit:
    """A `Linear4bit` with the bias of a linear layer and another weight, floating `[out, in]`.

    Args:
        dtype (`torch.dtype`): What the weight dequantizes to.
        base_layer, compute_dtype, quant_type, double_quant: See [`empty_four_bit_layer`].
    """
    layer = empty_four_bit_layer(base_layer, tuple(weight.shape), compute_dtype, quant_type, double_quant)
    layer.weight = pack_weight(layer, weight, dtype)
    return layer


def declare_four_bit(model: PreTrainedModel, quant_type: str, double_quant: bool, compute_dtype: torch.dtype) -> None:
    """Tell transformers that a model with `Linear4bit` layers is one that bitsandbytes quantized, as its checkpoint will."""
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
