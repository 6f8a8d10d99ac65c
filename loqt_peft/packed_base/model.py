"""A model in memory, or one of no weights yet, packed layer by layer onto a device."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..layers.base_weight import BaseWeight
from ..layers.four_bit import declare_four_bit, four_bit_layer
from .config import LoQTQuantizationConfig
from .targets import packed_layers


# seconds after which a bar is shown
_PATIENCE = 3


def pack_model(
    model: PreTrainedModel,
    device: torch.device | str | int | None = None,
    quantization_config: LoQTQuantizationConfig | None = None,
) -> PreTrainedModel:
    """Pack the layers of a model into 4 bits, in place and one by one onto a device, which never holds them in 16 bits.

    A model on `meta` has no weights: it gets those with which transformers initializes one, as for pretraining.

    ```py
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(pack_model(model, "cuda"), LoQTConfig(full_rank_modules="all"))
    ```

    A bar shows the progress when it takes longer than a few seconds, unless transformers' or datasets' bars are disabled.

    Args:
        model (`PreTrainedModel`): On the CPU, a device or `meta`, in float32, bfloat16 or float16; used up.
        device (`torch.device`, `str` or `int`, *optional*): Where it will lie; where it is if `None`, the CPU for `meta`.
        quantization_config ([`LoQTQuantizationConfig`], *optional*): How; its defaults if `None`.

    Returns:
        `PreTrainedModel`: The same model; to transformers and PEFT it is one that bitsandbytes quantized.

    Raises:
        ValueError: If it is quantized or offloaded, has an adapter, a dtype that is not allowed, or no layer to pack.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantized already. Load it without quantization, or train it as it is.")
    if getattr(model, "peft_config", None):
        raise ValueError("The model has an adapter. Pack the base model before an adapter is added.")
    config = quantization_config or LoQTQuantizationConfig()
    meta = {parameter.is_meta for parameter in model.parameters()}
    if len(meta) > 1:
        raise ValueError("Some weights of the model are on meta and some are not: it is offloaded, or half loaded.")
    if device is None:
        device = "cpu" if meta == {True} else model.device
    packer = _Packer(model, torch.device(device), config)
    if meta == {True}:
        packer.initialize_and_pack()
    else:
        packer.pack_all()
    declare_four_bit(model, config.quantize_weight, config.double_quant, packer.dtype)
    return model


class _Packer:
    def __init__(self, model: PreTrainedModel, device: torch.device, config: LoQTQuantizationConfig) -> None:
        self.model, self.device, self.config = model, device, config
        self.dtype = model.dtype
        self.targets = packed_layers(model, self.dtype, config.modules_to_not_convert)
        self.bar = _progress_bar(len(self.targets))

    @torch.no_grad()
    def pack_all(self) -> None:
        with self.bar:
            # names only: a layer is freed once it is packed
            for name in [name for name, _ in self.model.named_modules()]:
                self.move(self.model.get_submodule(name))
                if name in self.targets:
                    self.pack(name)

    @torch.no_grad()
    def move(self, module: nn.Module) -> None:
        """Bring what a module holds by itself to the device; tied weights stay the one Parameter that they are."""
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(self.device)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(self.device)

    @torch.no_grad()
    def pack(self, name: str) -> None:
        """Put a `Linear4bit` in the place of a layer that lies on the device."""
        layer, config = self.model.get_submodule(name), self.config
        weight = layer.weight.detach()
        if not all(bound.isfinite() for bound in torch.aminmax(weight)):
            raise ValueError(f"The weight of {name!r} cannot be packed: it holds NaN or infinity.")
        if BaseWeight(layer).transposed:
            weight = weight.T
        packed = four_bit_layer(layer, weight, weight.dtype, self.dtype, config.quantize_weight, config.double_quant)
        packed.requires_grad_(False)
        # transformers initializes nothing that is marked so
        packed._is_hf_initialized = packed.weight._is_hf_initialized = True
        self.model.set_submodule(name, packed)
        self.bar.update()

    ###############################
    # Without weights
    ###############################

    def initialize_and_pack(self) -> None:
        """Initialize module by module in transformers' own order, and pack each block as soon as it has values."""
        model = self.model
        names = {id(module): name for name, module in model.named_modules()}
        held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        # a parameter on meta that several modules hold -> the one that takes its place
        self.filled = {id(p): (p, None) for p in model.parameters() if held[id(p)] > 1}
        blocks = defaultdict(list)
        for name in self.targets:
            blocks[_block(name)].append(name)
        parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]

        def instead_of(initialize: Callable[..., None]) -> Callable[..., None]:
            def initialize_one(module: nn.Module, *args: Any) -> None:
                tied = self.materialize(module)
                initialize(module, *args)
                module._parameters.update(tied)
                for target in blocks.get(names[id(module)], ()):
                    self.pack(target)

            return initialize_one

        for part in parts:
            part._initialize_weights = instead_of(part._initialize_weights)
        try:
            with self.bar:
                model.initialize_weights()
        finally:
            for part in parts:
                del part._initialize_weights

    @torch.no_grad()
    def materialize(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Give what a module holds on `meta` memory on the device.

        Returns:
            `dict[str, nn.Parameter]`: What takes the place of tied weights once they are initialized, as all others are.
        """
        tied: dict[str, nn.Parameter] = {}
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            values = torch.empty_like(parameter, device=self.device)
            module._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            if id(parameter) in self.filled:
                first = self.filled[id(parameter)][1]
                if first is None:
                    self.filled[id(parameter)] = (parameter, module._parameters[name])
                else:
                    tied[name] = first
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=self.device)
        return tied


def _block(name: str) -> str:
    """The module around a layer whose initialization is the last that changes it: a numbered block, or what it lies in."""
    parts = name.split(".")[:-1]
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1] if numbered else parts)


def _progress_bar(total: int):
    datasets = sys.modules.get("datasets")
    disabled = datasets is not None and datasets.are_progress_bars_disabled()
    # transformers' own shows nothing if its bars are disabled
    return logging.tqdm(total=total, desc="Packing layers", delay=_PATIENCE, disable=disabled)
