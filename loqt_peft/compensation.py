"""Requantization with error compensation: argmin over Q, B of ‖W − deq(Q) − s·PB‖ (paper §3.3, Algorithm 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .projection import gram, is_right, pseudo_inverse
from .quantization import DenseFormat, FourBitFormat


class Compensated(NamedTuple):
    """Result of [`compensate`].

    Attributes:
        weight (`torch.Tensor`): Q, packed as the format says.
        B (`torch.Tensor`): In the dtype asked for.
        error_before (`torch.Tensor`): ‖W − deq(q(W))‖², 0-d float32.
        error_after (`torch.Tensor`): ‖W − deq(Q) − s·PB‖², 0-d float32.
    """

    weight: torch.Tensor
    B: torch.Tensor
    error_before: torch.Tensor
    error_after: torch.Tensor


def compensate(
    W: torch.Tensor,
    P: torch.Tensor,
    storage: FourBitFormat | DenseFormat,
    scale: float,
    steps: int,
    dtype: torch.dtype = torch.float32,
) -> Compensated:
    r"""Quantize W, and let B take up what quantization lost within the span of P.

    Starting from B = 0, `steps` times: Q ← q(W − s·PB), B ← P⁺(W − deq(Q)) / s. The pair with the smallest
    ‖W − deq(Q) − s·PB‖ is kept; a pair counts with B as it is stored. The residual is W − deq(Q), as in LoftQ and in the
    authors' code; the printed Algorithm 2 differs.

    Args:
        W (`torch.Tensor`): The merged weight, float32 `[out, in]`.
        P (`torch.Tensor`): The projection as the forward pass will see it, float32 `[r, in]` or `[out, r]`.
        storage: The format of Q.
        scale (`float`): s.
        steps (`int`): K. With 0, Q = q(W) and B = 0.
        dtype (`torch.dtype`): Dtype of B.

    Returns:
        [`Compensated`]
    """
    right = is_right(W.shape)
    # the pair that the iteration starts from: nothing in B
    weight = storage.pack(W)
    r = P.shape[0] if right else P.shape[1]
    B = torch.zeros((W.shape[0], r) if right else (r, W.shape[1]), dtype=dtype, device=W.device)
    if storage.is_lossless:
        return Compensated(weight, B, W.new_zeros(()), W.new_zeros(()))
    # W and one matrix of its size are held, not more
    residual = storage.unpack(weight)
    torch.sub(W, residual, out=residual)
    error_before = _squared_norm(residual)
    best = Compensated(weight, B, error_before, error_before)
    if steps == 0:
        return best
    inverse, inner = pseudo_inverse(P, right) / scale, gram(P, right)
    for step in range(steps):
        least_squares = residual @ inverse if right else inverse @ residual
        B = least_squares.to(dtype)
        # ‖R − s·PB‖² by the inner products of P, which are smaller than R. R acts on P's span as s·P times the unrounded B.
        stored = B.float()
        image = stored @ inner if right else inner @ stored
        products = 2 * _dot(image, least_squares) - _dot(image, stored)
        error = _squared_norm(residual) - scale**2 * products
        del image, least_squares
        # chosen on the device, which nobody waits for
        better = error < best.error_after
        best = Compensated(
            torch.where(better, weight, best.weight),
            torch.where(better, B, best.B),
            error_before,
            torch.where(better, error, best.error_after),
        )
        if step + 1 < steps:
            # the room of the residual serves W − s·PB, and then that of the next one
            torch.addmm(W, *((stored, P) if right else (P, stored)), alpha=-scale, out=residual)
            weight = storage.pack(residual)
            del residual
            residual = storage.unpack(weight)
            torch.sub(W, residual, out=residual)
    return best._replace(error_after=best.error_after.clamp(min=0))


def _dot(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    # without a matrix of products
    return torch.dot(X.flatten(), Y.flatten())


def _squared_norm(X: torch.Tensor) -> torch.Tensor:
    # without a matrix of squares
    return torch.linalg.vector_norm(X).square()
