"""The linear map of an adapted layer and its derivative, as few and as small products as its shapes allow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..compat import storage_key
from .operations import BRANCH, THIN, WEIGHT, cheapest, keeps_input
from .projection import restrict
from .quantization import DenseFormat, FourBitFormat


# what was made of a layer's input, as long as that lives: neighbours (query, key and value) share one
_rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _as_rows(x: torch.Tensor, dtype: torch.dtype, keep: bool) -> torch.Tensor:
    """x `[..., in]` as `[n, in]` of `dtype`; with `keep`, the next layer with this input gets the same tensor."""
    known = _rows.get(x) if keep else None
    if known is not None and known[0] == x._version and known[1].dtype == dtype:
        return known[1]
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    if keep and storage_key(rows) != storage_key(x):
        _rows[x] = x._version, rows
    return rows


def weight_gradient(grad_y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """dL/dW = (dL/dy)ᵀ x, `[out, in]`, in the dtype of dL/dy, or in float32 for a float16 one.

    Args:
        grad_y (`torch.Tensor`): dL/dy, `[n, out]`.
        rows (`torch.Tensor`): x, `[n, in]`.
    """
    # the fp16 loss scale suits dL/dy, but a sum over all tokens would overflow
    if grad_y.dtype == torch.float16:
        grad_y = grad_y.float()
    return grad_y.T @ rows.to(grad_y.dtype)


class LoQTLinear(torch.autograd.Function):
    r"""`y = x deq(W_q)ᵀ + b + s · x (PB)ᵀ` (paper eq. 5), in the dtype of B.

    Where rows are many, s·PB is added to the buffer that dequantization makes anyway, so that there is one product forward
    and one for the gradient of x; see [`operations`]. For the backward pass W and P are kept as they are packed, and of the
    activations x or `x Pᵀ`; see [`keeps_input`].

    Args:
        x (`torch.Tensor`): `[..., in]`, floating.
        B (`torch.Tensor`): `[out, r]` or `[r, in]`.
        bias (`torch.Tensor`, *optional*): `[out]`, of the dtype of B.
        weight (`torch.Tensor`): W as `weight_format` packs it.
        P (`torch.Tensor`): P as `projection_format` packs it.
        weight_format, projection_format: How they are stored.
        scale (`float`): s.
        right (`bool`): Whether P is on the input side.
        record (`Callable`, *optional*):
            Called in the backward pass with dL/dW, float32 `[out, in]`; the tensor is the callee's.

    Returns:
        `torch.Tensor`: `[n, out]`.
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
        record: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        ctx.weight_format, ctx.projection_format = weight_format, projection_format
        ctx.scale, ctx.right, ctx.record = scale, right, record
        needs_x, needs_B = ctx.needs_input_grad[:2]
        shape, r = weight_format.shape, B.shape[1] if right else B.shape[0]
        ctx.way = cheapest(x.numel() // shape[1], shape, r, needs_x, needs_B, record is not None)
        is_thin = needs_B and not keeps_input(ctx.way, shape, r)
        keeps_x = record is not None or (needs_B and not is_thin)
        rows = _as_rows(x, B.dtype, keeps_x)
        thin = None
        if is_thin or (right and ctx.way == BRANCH):
            thin = projection_format.linear(rows, P)
        # not a view, or nobody could write to it
        if ctx.way == BRANCH:
            y = weight_format.linear(rows, weight, bias)
            factors = (thin, B.T) if right else (rows @ B.T, projection_format.unpack(P, B.dtype).T)
            y.addmm_(*factors, alpha=scale)
        else:
            y = torch.nn.functional.linear(rows, LoQTLinear._sum(ctx, weight, P, B), bias)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(rows if keeps_x else None, thin if is_thin else None, B, weight, P)
        return y

    @staticmethod
    def _sum(ctx, weight: torch.Tensor, P: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """deq(W_q) + s·PB `[out, in]`, rounded once to the dtype of B."""
        W, P = ctx.weight_format.unpack(weight, B.dtype), ctx.projection_format.unpack(P, B.dtype)
        factors = (B, P) if ctx.right else (P, B)
        # a dense weight is no buffer of ours
        return torch.addmm(W, *factors, alpha=ctx.scale, out=None if W is weight else W)

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor):
        rows, thin, B, weight, packed = ctx.saved_tensors
        needs_x, needs_B, needs_bias = ctx.needs_input_grad[:3]
        right, scale = ctx.right, ctx.scale
        grad_x = grad_B = grad_bias = None
        if needs_bias:
            grad_bias = grad_y.sum(0)
        by_weight = needs_B and ctx.way == WEIGHT
        if by_weight or ctx.record is not None:
            gradient = grad_y.T @ rows if ctx.record is None else weight_gradient(grad_y, rows)
            if by_weight:
                # before the callee has it
                P = ctx.projection_format.unpack(packed, gradient.dtype)
                grad_B = restrict(gradient, P, right).mul_(scale).to(B.dtype)
                del P
            if ctx.record is not None:
                gradient = gradient.float()
                ctx.record(gradient)
            del gradient
        if ctx.way == BRANCH:
            if needs_x:
                grad_x = grad_y @ ctx.weight_format.unpack(weight, grad_y.dtype)
            P = ctx.projection_format.unpack(packed, grad_y.dtype) if needs_x or not right else None
            if right:
                if needs_B:
                    grad_B = (grad_y.T @ thin).mul_(scale)
                factors = (grad_y @ B, P) if needs_x else None
            else:
                inner = grad_y @ P
                if needs_B:
                    grad_B = (inner.T @ rows).mul_(scale)
                factors = inner, B
            if needs_x:
                grad_x.addmm_(*factors, alpha=scale)
        else:
            if needs_x:
                grad_x = grad_y @ LoQTLinear._sum(ctx, weight, packed, B)
            if needs_B and ctx.way == THIN:
                if not right:
                    grad_B = ((grad_y @ ctx.projection_format.unpack(packed, grad_y.dtype)).T @ rows).mul_(scale)
                else:
                    thin = ctx.projection_format.linear(rows, packed) if thin is None else thin
                    grad_B = (grad_y.T @ thin).mul_(scale)
        if needs_x:
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        return grad_x, grad_B, grad_bias, *[None] * 7
