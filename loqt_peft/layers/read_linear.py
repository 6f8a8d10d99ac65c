"""A layer whose weight the model also reads by itself, for a fused kernel, and what it gives it."""

from __future__ import annotations

import torch
from torch import nn

from ..algorithm.precision import without_autocast
from ..algorithm.projection import restrict
from .linear import Linear


# class of a module in transformers -> linear layers of it that it calls, or whose `.weight` it hands to a kernel instead:
# those of Mamba, where they are installed, in training
READ_OR_CALLED: dict[str, tuple[str, ...]] = {
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": ("x_proj", "out_proj"),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": ("x_proj", "out_proj"),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
}


def is_read_or_called(parent: nn.Module, child: str) -> bool:
    """Whether the layer `child` of a module is one of [`READ_OR_CALLED`]."""
    return any(child in READ_OR_CALLED.get(cls.__name__, ()) for cls in type(parent).__mro__)


class ReadLinear(Linear):
    """[`Linear`] with a `weight` that takes part in computations: deq(W_q) + s·PB, which autograd knows as made of B.

    Where a kernel has read it, the backward pass gets dL/dW from it: this gives dL/dB, and on an update step it is recorded.
    A dense weight of one layer, in the dtype of the base, lives as long as the kernel keeps it.
    """

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the layer computes with, `[out, in]`.

        Raises:
            ValueError: If several adapters are active.
        """
        return self._read()

    # no graph knows of the recording
    @torch.compiler.disable
    def _read(self) -> torch.Tensor:
        adapters = (
            [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in self.loqt_B]
        )
        if not adapters:
            base = self.get_base_layer().weight
            return (
                base
                if self.quantization_backend is None
                else self.base.value(self.compute_device).to(self.weight_dtype)
            )
        if len(adapters) > 1:
            raise ValueError(f"Several adapters are active, {adapters}, and the model reads the weight of one layer.")
        records = self.training and self.capture.records and self.capture.adapter_name == adapters[0]
        return _EffectiveWeight.apply(self.loqt_B[adapters[0]], self, adapters[0], records)


class _EffectiveWeight(torch.autograd.Function):
    """deq(W_q) + s·PB as a function of B, in the dtype of the base weight."""

    @staticmethod
    def forward(ctx, B: torch.Tensor, layer: ReadLinear, adapter_name: str, records: bool) -> torch.Tensor:
        ctx.layer, ctx.adapter_name, ctx.records = layer, adapter_name, records
        return layer.effective_weight(adapter_name).to(layer.weight_dtype)

    @staticmethod
    @without_autocast
    def backward(ctx, gradient: torch.Tensor):
        layer, name = ctx.layer, ctx.adapter_name
        gradient, grad_B = gradient.float(), None
        if ctx.needs_input_grad[0]:
            grad_B = restrict(gradient, layer.projection(name), layer.right).mul_(layer.scaling[name])
            grad_B = grad_B.to(layer.loqt_B[name].dtype)
        if ctx.records:
            # how often it is read is not counted, so that what is recorded is kept until the end of the step
            layer.capture.add(gradient.clone())
        return grad_B, None, None, None
