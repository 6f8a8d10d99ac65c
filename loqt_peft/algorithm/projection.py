"""The projection P: leading singular vectors of a gradient on its smaller side (paper §3.1), or random directions.

Layouts, for W `[out, in]` and rank r:

| | P | B | ΔW / s |
|---|---|---|---|
| in <= out, "right" | `[r, in]` | `[out, r]` | `B @ P` |
| in > out, "left" | `[out, r]` | `[r, in]` | `P @ B` |
"""

from __future__ import annotations

import torch

from ..choices import OF_GRADIENT


# of the randomized range finder
MIN_OVERSAMPLING, OVERSAMPLING_SHARE = 32, 8
# share of the mean eigenvalue of a Gram matrix
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


def squared_norm(X: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norm of a matrix, 0-d; without a matrix of squares."""
    # row by row: in one float32 sum over millions of squares the small ones are lost
    return torch.linalg.vector_norm(X, dim=1).square().sum()


def project(gradient: torch.Tensor, r: int, method: str = "randomized") -> torch.Tensor:
    r"""The top-r singular vectors of the gradient on its smaller side (paper Algorithm 1, line 7).

    Args:
        gradient (`torch.Tensor`): dL/dW, `[out, in]`, floating, finite.
        r (`int`): Number of directions, at most min(out, in).
        method (`str`):
            `"svd"`: exact, by eigenvectors of the Gram matrix of the smaller side in float64: all that float32 holds of the
            gradient is resolved. `"eigh"`: the same in float32; directions weaker than about 3e-4 of the strongest one are
            below what it resolves.
            `"randomized"`: Halko et al.'s range finder on Gᵀ G, with r/8, but at least 32, extra directions, from a fixed
            seed, which leaves the global random state alone; it makes no copy of the gradient, only thin matrices. It
            resolves as much as `"eigh"`.

    Returns:
        `torch.Tensor`:
            P, float32, orthonormal, `[r, in]` if in <= out, else `[out, r]`. The largest entry of each vector is positive.

    Raises:
        ValueError: If `r` or `method` is out of range.
    """
    _check_rank(r, gradient.shape)
    right = is_right(gradient.shape)
    # one orientation from here on: the smaller side is the second one
    G = (gradient if right else gradient.T).float()
    # an arbitrary loss scale must not push the Gram matrix out of float32
    scale = torch.linalg.vector_norm(G, torch.inf).clamp_min(1e-30).reciprocal()
    if method == "svd":
        # in less time than a decomposition of G itself, which on CUDA is iterative, and closer in weak directions
        vectors = torch.linalg.eigh(_gram_in_float64(G, scale)).eigenvectors[:, -r:].flip(1).T.float()
    elif method == "eigh":
        G = G * scale
        vectors = torch.linalg.eigh(G.T @ G).eigenvectors[:, -r:].flip(1).T
    elif method == "randomized":
        vectors = _randomized(G, scale, r)
    else:
        raise ValueError(f"method={method!r} is not allowed: one of {', '.join(map(repr, OF_GRADIENT))}.")
    return _as_projection(vectors, right)


def random_projection(shape: tuple[int, int], r: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Orthonormal directions, uniformly distributed; the global random state is left alone.

    Args:
        shape (`tuple[int, int]`): Of W, `[out, in]`.
        r (`int`): Number of directions, at most min(out, in).
        seed (`int`): The same seed gives the same directions on the same kind of device.
        device (`torch.device`): Where P is wanted.

    Returns:
        `torch.Tensor`: P, as [`project`] returns it.

    Raises:
        ValueError: If `r` is out of range.
    """
    _check_rank(r, shape)
    vectors = torch.linalg.qr(_normal(min(shape), r, seed, torch.device(device))).Q.T
    return _as_projection(vectors, is_right(shape))


def _check_rank(r: int, shape: tuple[int, int]) -> None:
    if not 0 < r <= min(shape):
        raise ValueError(f"r={r} is not allowed for a weight of shape {tuple(shape)}: 1 to its smaller side.")


def _as_projection(vectors: torch.Tensor, right: bool) -> torch.Tensor:
    # the sign of a direction is arbitrary, and 4-bit rounding is not symmetric
    signs = torch.where(vectors.amax(dim=1) >= -vectors.amin(dim=1), 1.0, -1.0).to(vectors.dtype)
    vectors = vectors * signs.unsqueeze(1)
    return (vectors if right else vectors.T).contiguous()


def _normal(rows: int, columns: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator("cuda" if device.type == "cuda" else "cpu").manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device=generator.device)
    return noise.to(device)


def _gram_in_float64(G: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """GᵀG, float64 `[n, n]`, of G `[m, n]`, m >= n, times `scale`."""
    gram = G.new_zeros(G.shape[1], G.shape[1], dtype=torch.float64)
    # a square at a time: a copy of the whole in float64 would be twice the gradient
    for rows in G.split(G.shape[1]):
        rows = rows.double().mul_(scale)
        gram.addmm_(rows.T, rows)
    return gram


def sketch_width(r: int, smaller_side: int) -> int:
    """How many directions the randomized range finder looks at to find r."""
    return min(r + max(MIN_OVERSAMPLING, r // OVERSAMPLING_SHARE), smaller_side)


def _randomized(G: torch.Tensor, scale: torch.Tensor, r: int) -> torch.Tensor:
    """The top-r right singular vectors of G `[m, n]`, m >= n, in the rows of `[r, n]`."""
    n = G.shape[1]
    sketch = G @ _normal(n, sketch_width(r, n), 0, G.device).mul_(scale)
    # the basis lies on the smaller side, so that it alone has to be orthonormal
    image = (G.T @ sketch).mul_(scale)
    del sketch
    basis = torch.linalg.qr(image).Q
    del image
    coordinates = (G @ basis).mul_(scale)
    rotation = torch.linalg.eigh(coordinates.T @ coordinates).eigenvectors[:, -r:].flip(1)
    return (basis @ rotation).T


def orthonormalize(P: torch.Tensor, right: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis of the span of P, by a Cholesky factor L of its Gram matrix.

    P went through 4 bits and is not orthonormal any more, so P⁺ is not Pᵀ. In the coordinates of the basis least squares
    and norms cost nothing. A ridge of 1e-6 of the mean squared length keeps the factor regular where directions are zero;
    they are zero in the basis too.

    Args:
        P (`torch.Tensor`): float32 `[r, in]` ("right") or `[out, r]`.
        right (`bool`): Which of both.

    Returns:
        The basis Q, of the shape of P, and T = L⁻¹ `[r, r]`: Q = T P ("right") or P Tᵀ.
    """
    inner = P @ P.T if right else P.T @ P
    ridge = RIDGE * inner.trace() / len(inner) + torch.finfo(torch.float32).tiny ** 0.5
    inner.diagonal().add_(ridge)
    identity = torch.eye(len(inner), dtype=inner.dtype, device=P.device)
    T = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(inner).L, identity, upper=False)
    return (T @ P if right else P @ T.T), T


def captured_energy(gradient: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norm of the part of the gradient that lies in the span of P; a 0-d tensor."""
    right = is_right(gradient.shape)
    return squared_norm(restrict(gradient, orthonormalize(P, right)[0], right))
