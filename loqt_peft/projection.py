"""From the gradient of a weight to the projection P: its leading singular vectors on the smaller side (paper §3.1).

Layouts, for W `[out, in]` and rank r:

| | P | B | ΔW / s |
|---|---|---|---|
| in <= out, "right" | `[r, in]` | `[out, r]` | `B @ P` |
| in > out, "left" | `[out, r]` | `[r, in]` | `P @ B` |
"""

from __future__ import annotations

import torch


PROJECTIONS = ("svd", "eigh", "randomized", "random")
OVERSAMPLING = 8
POWER_ITERATIONS = 1
# share of the trace, where a Gram matrix has lost rank
RIDGE = 1e-6


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


def project(gradient: torch.Tensor, r: int, method: str = "randomized", seed: int = 0) -> torch.Tensor:
    r"""The top-r singular vectors of the gradient on its smaller side (paper Algorithm 1, line 7), or random directions.

    Args:
        gradient (`torch.Tensor`): dL/dW, `[out, in]`, floating, finite.
        r (`int`): Number of directions, at most min(out, in).
        method (`str`):
            `"svd"`: exact. `"eigh"`: eigenvectors of the Gram matrix of the smaller side, exact up to rounding.
            `"randomized"`: Halko et al.'s range finder with 8 extra directions and a power iteration, from a fixed seed; it
            makes no copy of the gradient, only thin matrices. `"random"`: orthonormal directions that have nothing to do
            with the gradient. The global random state is left alone by both.
        seed (`int`): Of `"random"`.

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
    scale = torch.linalg.vector_norm(G, torch.inf).clamp_min(1e-30).reciprocal()
    if method == "svd":
        vectors = torch.linalg.svd(G * scale, full_matrices=False).Vh[:r]
    elif method == "eigh":
        G = G * scale
        vectors = torch.linalg.eigh(G.T @ G).eigenvectors[:, -r:].flip(1).T
    elif method == "randomized":
        vectors = _randomized(G, scale, r)
    elif method == "random":
        vectors = torch.linalg.qr(_normal(G.shape[1], r, seed, G.device)).Q.T
    else:
        raise ValueError(f"projection={method!r} is not allowed: one of {', '.join(map(repr, PROJECTIONS))}.")
    # the sign of a singular vector is arbitrary, and 4-bit rounding is not symmetric
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = vectors * largest.sign()
    return (vectors if right else vectors.T).contiguous()


def _normal(rows: int, columns: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator("cuda" if device.type == "cuda" else "cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=generator.device).to(device)


def _randomized(G: torch.Tensor, scale: torch.Tensor, r: int) -> torch.Tensor:
    """The top-r right singular vectors of G `[m, n]`, m >= n, in the rows of `[r, n]`."""
    m, n = G.shape
    width = min(r + OVERSAMPLING, n)
    # the basis lies on the smaller side, so that it alone has to be orthonormal
    basis = torch.linalg.qr(G.T @ (_normal(m, width, 0, G.device) * scale)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(G.T @ (G @ basis * scale)).Q
    coordinates = G @ basis * scale
    rotation = torch.linalg.eigh(coordinates.T @ coordinates).eigenvectors[:, -r:].flip(1)
    return (basis @ rotation).T


def _cholesky(inner: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of a Gram matrix `[r, r]`; where it has lost rank, of one with a small ridge.

    Nothing here waits for the device.
    """
    factor, info = torch.linalg.cholesky_ex(inner)
    ridge = RIDGE * inner.trace() + torch.finfo(torch.float32).tiny ** 0.5
    regular = torch.linalg.cholesky_ex(inner + torch.diag_embed(ridge.expand(len(inner)))).L
    return torch.where(info > 0, regular, factor)


def pseudo_inverse(P: torch.Tensor, right: bool) -> torch.Tensor:
    """P⁺, in the transposed shape of P: `Pᵀ (P Pᵀ)⁻¹` or `(Pᵀ P)⁻¹ Pᵀ`.

    P went through 4 bits and is not orthonormal any more, so P⁺ is not Pᵀ. An r x r Cholesky solve; where P has lost
    rank, that of the least squares with a ridge of 1e-6 of its trace. Of zeros it is zeros.
    """
    factor = _cholesky(gram(P, right))
    return torch.cholesky_solve(P, factor).T if right else torch.cholesky_solve(P.T, factor)


def captured_energy(gradient: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norm of the part of the gradient that lies in the span of P; a 0-d tensor."""
    right = is_right(gradient.shape)
    coordinates = restrict(gradient, P, right)
    inner = coordinates.T @ coordinates if right else coordinates @ coordinates.T
    # ‖G P⁺ P‖² = tr((P Pᵀ)⁻¹ P Gᵀ G Pᵀ)
    return torch.cholesky_solve(inner, _cholesky(gram(P, right))).trace()
