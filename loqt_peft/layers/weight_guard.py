"""The `weight` of a LoQT layer, for models that read it instead of calling the layer."""

from __future__ import annotations

import torch


# reading these is harmless: T5 casts its input to the dtype of a layer's weight
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in (
        "device",
        "dtype",
        "grad",
        "is_cuda",
        "is_leaf",
        "is_meta",
        "layout",
        "ndim",
        "requires_grad",
        "shape",
    )
} | {
    torch.Tensor.data_ptr,
    torch.Tensor.dim,
    torch.Tensor.element_size,
    torch.Tensor.get_device,
    torch.Tensor.is_complex,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.nelement,
    torch.Tensor.numel,
    torch.Tensor.size,
    torch.Tensor.stride,
}


class UnreadableWeight(torch.Tensor):
    """A base weight that says what it is, but takes part in no computation.

    What the layer computes with is another weight, so that a model which reads `layer.weight` would go on without anything
    that LoQT learns. torch's own shortcuts that read weights, as that of `nn.TransformerEncoderLayer`, give way to tensors
    like this one and call the layer.
    """

    def __repr__(self, **kwargs) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(
            "The `weight` of a LoQT layer was read, but the layer computes with another one (see `effective_weight`); that "
            "of the base model is `get_base_layer().weight`. If a model reads it instead of calling the layer, LoQT cannot "
            "act there: leave the layer out of target_modules, or add it to exclude_modules."
        )
