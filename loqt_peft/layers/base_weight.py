"""The original weight under a LoQT layer: where it lies, how it is read, moved, dropped, replaced and brought back."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..algorithm.quantization import on_device, undo_cpu_packing
from ..saving.seal import base_storage_code, no_sample, sample


def source_class(base_layer: nn.Module) -> type[nn.Module]:
    """The class of a layer before transformers quantized it: a `Linear4bit` may stand for a `Conv1D`."""
    return getattr(base_layer, "source_cls", type(base_layer))


def dense_layer(base_layer: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """A base layer with another weight; in place of a `Linear4bit` a new `nn.Linear` or `Conv1D`.

    Args:
        base_layer (`nn.Module`): `nn.Linear`, `Conv1D` or `Linear4bit`.
        weight (`torch.Tensor`): `[out, in]`.
        dtype (`torch.dtype`): Of the layer's weight.
    """
    transposed = issubclass(source_class(base_layer), Conv1D)
    if isinstance(base_layer, bnb.nn.Linear4bit):
        bias, training = base_layer.bias, base_layer.training
        with torch.device("meta"):
            if transposed:
                base_layer = Conv1D(base_layer.out_features, base_layer.in_features)
            else:
                base_layer = nn.Linear(base_layer.in_features, base_layer.out_features, bias=bias is not None)
        base_layer.bias = bias
        base_layer.train(training)
    weight = weight.T if transposed else weight
    original = base_layer.weight
    if (original.shape, original.dtype, original.device) == (weight.shape, dtype, weight.device):
        # no second copy of the model beside weights that are mapped from a file
        original.copy_(weight)
    else:
        base_layer.weight = nn.Parameter(weight.to(dtype, copy=True).contiguous(), requires_grad=False)
    return base_layer


class BaseWeight:
    """What becomes of the weight of a base layer while adapters act in its place. Its values are never written to.

    Args:
        base_layer (`nn.Module`): `nn.Linear`, `Conv1D` or `Linear4bit`.

    Attributes:
        backend: PEFT's functions for a quantized weight; `None` for a dense one.
        transposed (`bool`): Whether it is stored as `[in, out]`, as in a `Conv1D`.
        dropped (`bool`): Whether it is gone for good.
        is_sharded (`bool`): Whether each process has a part of it only.
    """

    is_sharded = False

    def __init__(self, base_layer: nn.Module) -> None:
        self.layer = base_layer
        self.backend = resolve_quantization_backend(base_layer)
        self.transposed = isinstance(base_layer, Conv1D)
        self.dropped = False
        # of a dropped weight
        self._sample: tuple[int, torch.Tensor] | None = None
        # the weight that another one stands in for
        self._original: nn.Parameter | None = None
        state = getattr(base_layer.weight, "quant_state", None)
        self._quantized_dtype = None if state is None else state.dtype
        if self.backend is not None:
            # in eval, on processors with AVX512-BF16, bitsandbytes would round the absmax to bfloat16, for good
            undo_cpu_packing(base_layer.weight)
            self._repacks_on_cpu = base_layer.support_avx512bf16_for_cpu
            base_layer.support_avx512bf16_for_cpu = False

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""
        if self.transposed:
            inner, out = self.layer.weight.shape
            return out, inner
        return self.layer.out_features, self.layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype; of a 4-bit weight the one that it dequantizes to."""
        return self._quantized_dtype or self.layer.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.layer.weight.device

    def require(self, action: str) -> None:
        """
        Raises:
            ValueError: If the weight was dropped; the message says that `action` needs it.
        """
        if self.dropped:
            raise ValueError(
                f"{action} needs the original base weights, and they were dropped at the first switch "
                "(retain_base='drop'). Reload the base model, or train with retain_base='cpu'."
            )

    ###############################
    # Reading
    ###############################

    def value(self, device: torch.device) -> torch.Tensor:
        """The original weight, float32 `[out, in]`, on `device`."""
        self.require("The change of the original weights")
        current = self.layer.weight
        original = current if self._original is None else self._original
        undo_cpu_packing(original)
        self.layer.weight = on_device(original, device)
        try:
            weight = self.layer.weight.data if self.backend is None else self.backend.get_base_weight(self.layer)
        finally:
            self.layer.weight = current
        weight = weight.to(torch.float32)
        return weight.T if self.transposed else weight

    def sample(self, device: torch.device) -> tuple[int, torch.Tensor]:
        """How the original weight is stored, and 64 of its elements; NaN if it has no values (yet)."""
        if self.dropped:
            return self._sample
        weight = self.layer.weight if self._original is None else self._original
        if weight.device.type == "meta":
            return base_storage_code(weight), no_sample()
        if self.backend is None:
            return base_storage_code(weight), sample(weight.detach())
        return base_storage_code(weight), sample(self.value(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's output, on the device of x, wherever the weight lies."""
        if torch.is_grad_enabled():
            undo_cpu_packing(self.layer.weight)
        if self.layer.weight.device == x.device:
            return self.layer(x)
        return functional_call(self.layer, {"weight": on_device(self.layer.weight, x.device)}, x)

    ###############################
    # Placing
    ###############################

    def move(self, device: torch.device) -> None:
        """Move the weight, as it is stored."""
        weight = self.layer.weight
        if weight.device == device or weight.device.type == "meta":
            return
        if self.backend is not None:
            # Params4bit takes its quantization state along
            self.layer.weight = weight.to(device)
        else:
            weight.data = weight.data.to(device)

    def drop(self, device: torch.device) -> None:
        """Free the weight for good; a sample is kept."""
        self._sample = self.sample(device)
        weight = self.layer.weight
        # the (Params4bit) shell stays: it knows how to quantize a merged weight
        if getattr(weight, "quant_state", None) is not None:
            weight.quant_state.absmax = weight.quant_state.absmax.new_empty(0)
        weight.data = weight.data.new_empty(0)
        self.dropped = True

    def restore(self, device: torch.device) -> None:
        """Bring the original layer back to `device` and to its own ways, for good."""
        self.require("Unloading the adapter")
        self.move(device)
        if self.backend is not None:
            self.layer.support_avx512bf16_for_cpu = self._repacks_on_cpu

    ###############################
    # Replacing
    ###############################

    def replace(self, tuner_layer: nn.Module, weight: torch.Tensor, device: torch.device) -> None:
        """Let another weight stand in for the original one, which is kept; a quantized one is quantized anew.

        Args:
            tuner_layer (`BaseTunerLayer`): The layer that holds the base layer.
            weight (`torch.Tensor`): float32 `[out, in]`.
            device (`torch.device`): Of the computation.
        """
        weight = weight.T if self.transposed else weight
        original = self.layer.weight
        if self.backend is None:
            # a new Parameter, so that the original stays as it is
            self.layer.weight = nn.Parameter(weight.to(self.dtype).contiguous(), requires_grad=False)
        else:
            self.move(device)
            original = self.layer.weight
            self.backend.set_base_weight(tuner_layer, weight.contiguous())
            # the backend marks the weight that it replaces as not yet quantized
            original.bnb_quantized = True
        if self._original is None:
            self._original = original

    def put_back(self) -> None:
        """Put the original weight back in its place, bit for bit."""
        self.layer.weight, self._original = self._original, None
