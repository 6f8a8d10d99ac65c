"""From the gradient of a weight to the projection P: its leading singular vectors on the smaller side (paper §3.1).

Layouts, for W `[out, in]` and rank r:

| | P | B | ΔW / s |
|---|---|---|---|
| in <= out, "right" | `[r, in]` | `[out, r]` | `B @ P` |
| in > out, "left" | `[out, r]` | `[r, in]` | `P @ B` |
"""

from __future__ import annotations

import torch


PROJECTIONS = ("svd", "eigh", "randomized")
OVERSAMPLING = 8
POWER_ITERATIONS = 2


def is_right(shape: tuple[int, int]) -> bool:
    """Whether P multiplies W `[out, in]` on the right, that is, on its input side."""
    return shape[1] <= shape[0]


def projection_shape(shape: tuple[int, int], r: int) -> tuple[int, int]:
    """Shape of P for W of `shape` `[out, in]`."""
    return (r, shape[1]) if is_right(shape) else (shape[0], r)


def trainable_shape(shape: tuple[int, int], r: int) -> tuple[int, int]:
    """Shape of B for W of `shape` `[out, in]`."""
    return (shape[0], r) if is_right(shape) else (r, shape[1])


def expand(P: torch.Tensor, B: torch.Tensor, right: bool) -> torch.Tensor:
    """The low-rank product, `[out, in]`."""
    return B @ P if right else P @ B


def restrict(X: torch.Tensor, P: torch.Tensor, right: bool) -> torch.Tensor:
    """X `[out, in]` in the coordinates of P, in the shape of B: `X Pᵀ` or `Pᵀ X`."""
    return X @ P.T if right else P.T @ X


def gram(P: torch.Tensor, right: bool) -> torch.Tensor:
    """`[r, r]` inner products of the directions of P: `P Pᵀ` or `Pᵀ P`."""
    return P @ P.T if right else P.T @ P


def project(gradient: torch.Tensor, r: int, method: str = "randomized") -> torch.Tensor:
    r"""The top-r singular vectors of the gradient on its smaller side (paper Algorithm 1, line 7).

    Args:
        gradient (`torch.Tensor`): dL/dW, `[out, in]`, floating, finite.
        r (`int`): Number of directions, at most min(out, in).
        method (`str`):
            `"svd"`: exact. `"eigh"`: eigenvectors of the Gram matrix of the smaller side, exact up to rounding.
            `"randomized"`: Halko et al.'s range finder with 8 extra directions and 2 power iterations, from a fixed seed
            that leaves the global random state alone.

    Returns:
        `torch.Tensor`:
            P, float32, orthonormal, `[r, in]` if in <= out, else `[out, r]`. The largest entry of each vector is positive.

    Raises:
        ValueError: If `r` or `method` is out of range.
    """
    if not 0 < r <= min(gradient.shape):
        raise ValueError(
            f"r={r} is not allowed for a gradient of shape {tuple(gradient.shape)}: 1 to its smaller side."
        )
    right = is_right(gradient.shape)
    # one orientation from here on: the smaller side is the second one
    G = (gradient if right else gradient.T).float()
    # an arbitrary loss scale must not push the Gram matrix out of float32
    G = G / G.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    if method == "svd":
        vectors = torch.linalg.svd(G, full_matrices=False).Vh[:r]
    elif method == "eigh":
        vectors = torch.linalg.eigh(G.T @ G).eigenvectors[:, -r:].flip(1).T
    elif method == "randomized":
        devices = [G.device] if G.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            q = min(r + OVERSAMPLING, min(G.shape))
            vectors = torch.svd_lowrank(G, q=q, niter=POWER_ITERATIONS)[2][:, :r].T
    else:
        raise ValueError(f"projection={method!r} is not allowed: one of {', '.join(map(repr, PROJECTIONS))}.")
    # the sign of a singular vector is arbitrary, and 4-bit rounding is not symmetric
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = vectors * largest.sign()
    return (vectors if right else vectors.T).contiguous()


def pseudo_inverse(P: torch.Tensor, right: bool) -> torch.Tensor:
    """P⁺, in the transposed shape of P: `Pᵀ (P Pᵀ)⁻¹` or `(Pᵀ P)⁻¹ Pᵀ`.

    P went through 4 bits and is not orthonormal any more, so P⁺ is not Pᵀ. An r x r Cholesky solve; where P has lost
    rank, the Moore-Penrose inverse of its Gram matrix.
    """
    inner = gram(P, right)
    factor, info = torch.linalg.cholesky_ex(inner)
    if info.item() == 0:
        return torch.cholesky_solve(P, factor).T if right else torch.cholesky_solve(P.T, factor)
    inverse = torch.linalg.pinv(inner, hermitian=True)
    return P.T @ inverse if right else inverse @ P.T


def captured_energy(gradient: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norm of the part of the gradient that lies in the span of P; a 0-d tensor."""
    right = is_right(gradient.shape)
    coordinates = restrict(gradient, P, right)
    inverse = pseudo_inverse(P, right)
    # ‖G P⁺ P‖² = <G P⁺ P, G> = <G P⁺, G Pᵀ>
    projected = gradient @ inverse if right else inverse @ gradient
    return (projected * coordinates).sum()
