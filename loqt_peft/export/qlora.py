"""The export without loss: a 4-bit base with the adapter's own codes, and a LoRA adapter that holds s·PB."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ..algorithm.quantization import FourBitFormat
from ..choices import QUANT_TYPES
from ..layers.base_weight import dense_layer
from ..layers.find import loqt_layers
from ..layers.four_bit import declare_four_bit, empty_four_bit_layer, packed_weight
from ..layers.layer import LoQTLayer
from .conversion import cast, convert_layers
from .four_bit import base_dtype
from .lora import PEFT_PREFIX
from .report import Errors


# of the output directory: where the base model lies
BASE_FOLDER = "base"


def lora_factors(layer: LoQTLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """B and P as LoRA's A, float32 `[r, in]`, and B, float32 `[out, r]`; s is not in them."""
    B, P = layer.loqt_B[adapter_name].detach().float(), layer.projection(adapter_name)
    A, B = (P, B) if layer.right else (B, P)
    return A.contiguous(), B.contiguous()


def lora_config(tuner: BaseTuner, adapter_name: str) -> LoraConfig:
    """The config of a LoRA adapter with each layer's own rank and s = alpha / r."""
    config = tuner.peft_config[adapter_name]
    layers = {name: layer for name, layer in loqt_layers(tuner.model) if adapter_name in layer.loqt_B}
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    alphas = {name: layer.scaling[adapter_name] * layer.r[adapter_name] for name, layer in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern={name: own for name, own in ranks.items() if own != r},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
        target_modules=set(layers),
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
    )


@torch.no_grad()
def to_qlora(
    tuner: BaseTuner, adapter_name: str, dtype: torch.dtype | None = None, progressbar: bool = False
) -> tuple[Errors, LoraConfig, dict[str, torch.Tensor]]:
    """Turn `tuner.model` into the base of a LoRA adapter, in place and layer by layer, and take that adapter out of it.

    A layer that has switched becomes a `Linear4bit` with its own codes and absmax, or, if `quantize_weight` is `None`, a
    dense one with its own weight. One that has not switched becomes what it was: its base layer.

    Args:
        tuner (`BaseTuner`): A model with LoQT layers; they are used up.
        adapter_name (`str`): The adapter to convert.
        dtype (`torch.dtype`, *optional*):
            What the 4-bit weights dequantize to, and of all other parameters. `None`: each as in the base model.
        progressbar (`bool`): Show one.

    Returns:
        Errors; the LoRA adapter's config, and its state dict, A and B in float32.
    """
    model, config = tuner.model, tuner.peft_config[adapter_name]
    quant_type = config.quantize_weight or QUANT_TYPES[0]
    compute_dtype = dtype or base_dtype(model, adapter_name)
    lora = lora_config(tuner, adapter_name)
    factors, scales, state = {}, {}, {}
    for name, layer in loqt_layers(model):
        if adapter_name in layer.loqt_B:
            factors[name], scales[name] = lora_factors(layer, adapter_name), layer.scaling[adapter_name]
            for matrix, factor in zip("AB", factors[name], strict=True):
                state[f"{PEFT_PREFIX}{name}.lora_{matrix}.weight"] = factor

    def convert(layer: LoQTLayer, weight: torch.Tensor) -> nn.Module:
        if not layer.has_switched(adapter_name):
            layer.base.restore(layer.compute_device)
            return layer.get_base_layer()
        storage, packed = layer.weight_format(adapter_name), layer.loqt_weight[adapter_name]
        if not isinstance(storage, FourBitFormat):
            return dense_layer(layer.get_base_layer(), storage.unpack(packed), dtype or packed.dtype)
        base_layer = layer.get_base_layer()
        converted = empty_four_bit_layer(
            base_layer, layer.shape, compute_dtype, storage.quant_type, storage.double_quant
        )
        converted.weight = packed_weight(converted, storage, packed, dtype or layer.weight_dtype)
        return converted

    def change(name: str) -> torch.Tensor:
        A, B = factors[name]
        return (B @ A).mul_(scales[name])

    errors = convert_layers(tuner, adapter_name, convert, progressbar, beside=change)
    if dtype is not None:
        cast(model, dtype)
    if any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()):
        declare_four_bit(model, quant_type, config.double_quant, compute_dtype)
    elif getattr(model, "hf_quantizer", None) is not None:
        # with quantize_weight=None no layer of a 4-bit base is in 4 bits any more
        model.hf_quantizer.remove_quantization_config(model)
    return errors, lora, state


def save_qlora(
    tuner: BaseTuner, output_dir: Path, lora: LoraConfig, state: dict[str, torch.Tensor], base_name: str | None
) -> None:
    """Write the base model into a folder of `output_dir`, and the adapter that names it into `output_dir` itself."""
    base_dir = output_dir / BASE_FOLDER
    tuner.model.save_pretrained(base_dir)
    # a name that is not absolute would be looked for where the reader happens to be
    lora.base_model_name_or_path = base_name or str(base_dir.resolve())
    save_file(state, output_dir / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora.save_pretrained(output_dir)
