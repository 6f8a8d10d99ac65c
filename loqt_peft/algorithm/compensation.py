"""Requantization with error compensation: argmin over Q, B of ‖W − deq(Q) − s·PB‖ (paper §3.3, Algorithm 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .projection import is_right, orthonormalize, restrict, squared_norm, trainable_shape
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
    ‖W − deq(Q) − s·PB‖ is kept. The residual is W − deq(Q), as in LoftQ and in the authors' code; the printed Algorithm 2
    differs.

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
    weight = storage.pack(W)
    r = P.shape[0] if right else P.shape[1]
    # the pair that the iteration starts from: nothing in B
    B = W.new_zeros(trainable_shape(W.shape, r))
    if storage.is_lossless:
        return Compensated(weight, B.to(dtype), W.new_zeros(()), W.new_zeros(()))
    # W and one matrix of its size are held, not more
    residual = _residual(W, weight, storage)
    error_before = squared_norm(residual)
    best = Compensated(weight, B, error_before, error_before)
    del B
    if steps == 0:
        return best._replace(B=best.B.to(dtype))
    # least squares and their error cost nothing in the coordinates of an orthonormal basis: there B is until the end
    basis, T = orthonormalize(P, right)
    for step in range(steps):
        coordinates = restrict(residual, basis, right)
        best = _better_of(best, weight, coordinates, residual)
        if step + 1 < steps:
            # the room of the residual serves W − s·PB, and then that of the next one
            factors = (coordinates, basis) if right else (basis, coordinates)
            torch.addmm(W, *factors, alpha=-1, out=residual)
            del coordinates, factors
            weight = storage.pack(residual)
            del residual
            residual = _residual(W, weight, storage)
    # what rounding B to 16 bits adds to the error, some 1e-5 of it, is left out
    B = (best.B @ T if right else T.T @ best.B).div_(scale).to(dtype)
    return best._replace(B=B, error_after=best.error_after.clamp(min=0))


def _residual(W: torch.Tensor, weight: torch.Tensor, storage: FourBitFormat) -> torch.Tensor:
    """W − deq(Q), in the one matrix that unpacking Q takes."""
    residual = storage.unpack(weight)
    return torch.sub(W, residual, out=residual)


def _better_of(
    best: Compensated, weight: torch.Tensor, coordinates: torch.Tensor, residual: torch.Tensor
) -> Compensated:
    """The best pair so far or, if it leaves less of the residual, Q and the coordinates of its residual within the span."""
    error = squared_norm(residual) - squared_norm(coordinates)
    # chosen on the device, which nobody waits for
    better = error < best.error_after
    return Compensated(
        _where(better, weight, best.weight),
        _where(better, coordinates, best.B),
        best.error_before,
        torch.where(better, error, best.error_after),
    )


def _where(condition: torch.Tensor, X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    if X.dtype == torch.uint8:
        # a packed matrix has whole words, which take an eighth of the time
        return torch.where(condition, X.view(torch.int64), Y.view(torch.int64)).view(torch.uint8)
    return torch.where(condition, X, Y)
