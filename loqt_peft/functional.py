"""The linear map of an adapted layer and its derivative, with as few passes over activations as torch allows."""

from __future__ import annotations

import torch

from .quantization import DenseFormat, FourBitFormat


class LoQTLinear(torch.autograd.Function):
    r"""`y = x deq(W_q)ᵀ + b + s · x (PB)ᵀ`, all of one floating dtype (paper eq. 5).

    The low-rank branch, its scale and the sum of both gradients of x are part of matrix products. Of the activations only
    `x Pᵀ` (P on the input side) or x (P on the output side) is kept for the backward pass, and W and P as they are packed.

    Args:
        x (`torch.Tensor`): `[n, in]`.
        B (`torch.Tensor`): `[out, r]` or `[r, in]`.
        bias (`torch.Tensor`, *optional*): `[out]`.
        weight (`torch.Tensor`): W as `weight_format` packs it.
        P (`torch.Tensor`): P as `projection_format` packs it.
        weight_format, projection_format: How they are stored.
        scale (`float`): s.
        right (`bool`): Whether P is on the input side.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        B: torch.Tensor,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        P: torch.Tensor,
        weight_format: FourBitFormat | DenseFormat,
        projection_format: FourBitFormat | DenseFormat,
        scale: float,
        right: bool,
    ) -> torch.Tensor:
        # not a view, or nobody could write to it
        y = weight_format.linear(x, weight, bias)
        if right:
            kept = projection_format.linear(x, P)
            factors = kept, B.T
        else:
            kept = x
            factors = x @ B.T, projection_format.unpack(P, x.dtype).T
        y.addmm_(*factors, alpha=scale)
        ctx.save_for_backward(kept, B, weight, P)
        ctx.weight_format, ctx.projection_format = weight_format, projection_format
        ctx.scale, ctx.right = scale, right
        return y

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor):
        kept, B, weight, P = ctx.saved_tensors
        needs_x, needs_B, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_B = grad_bias = None
        if needs_bias:
            grad_bias = grad_y.sum(0)
        if needs_x:
            grad_x = grad_y @ ctx.weight_format.unpack(weight, grad_y.dtype)
        P = ctx.projection_format.unpack(P, grad_y.dtype) if needs_x or not ctx.right else None
        if ctx.right:
            if needs_B:
                grad_B = (grad_y.T @ kept).mul_(ctx.scale)
            factors = (grad_y @ B, P) if needs_x else None
        else:
            inner = grad_y @ P
            if needs_B:
                grad_B = (inner.T @ kept).mul_(ctx.scale)
            factors = inner, B
        if needs_x:
            grad_x.addmm_(*factors, alpha=ctx.scale)
        return grad_x, grad_B, grad_bias, None, None, None, None, None, None
