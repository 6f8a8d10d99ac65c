"""Floating-point operations, counted by hand: what a prediction of seconds is made of.

A product of `[a, b]` and `[b, c]` counts 2·a·b·c. Passes over memory (packing, norms) and launches are left out, so a
prediction made of these is a lower bound of sorts.
"""

from __future__ import annotations

from collections.abc import Iterable

from loqt_peft.algorithm.projection import sketch_width
from loqt_peft.memory.shape import Linear


def product_of_basis(smaller: int, r: int) -> int:
    """`orthonormalize`: the Gram matrix of P and T·P; factor and inverse of an r x r matrix, r³ together."""
    return 4 * smaller * r * r + r**3


def randomized(shape: tuple[int, int], r: int) -> int:
    """`project(..., "randomized")` with the energy that P captures, without `qr` and `eigh`."""
    larger, smaller = max(shape), min(shape)
    w = sketch_width(r, smaller)
    # sketch, image and coordinates; their Gram matrix; rotation; energy
    return 6 * larger * smaller * w + 2 * larger * w * w + 2 * smaller * w * r + energy(shape, r)


def energy(shape: tuple[int, int], r: int) -> int:
    """`captured_energy`."""
    return product_of_basis(min(shape), r) + 2 * shape[0] * shape[1] * r


def compensation(shape: tuple[int, int], r: int, steps: int) -> int:
    """`compensate`: a basis, K restrictions of the residual, K − 1 times W − s·PB, and B out of the basis' coordinates."""
    products = 2 * steps - 1 if steps else 0
    return product_of_basis(min(shape), r) + 2 * shape[0] * shape[1] * r * products + 2 * max(shape) * r * r


def merging(shape: tuple[int, int], r: int) -> int:
    """s·PB."""
    return 2 * shape[0] * shape[1] * r


def update(shapes: Iterable[tuple[int, int]], rank: int, steps: int) -> int:
    """An update of all layers, from gradients to new W, P and B, without `qr` and `eigh`."""
    total = 0
    for shape in shapes:
        r = min(rank, *shape)
        total += randomized(shape, r) + merging(shape, r) + compensation(shape, r, steps)
    return total


def training_token(linears: Iterable[Linear], rank: int | None, trains_weights: bool) -> int:
    """Forward and backward of one token through linear layers: 2 for the output, 2 for dL/dx, 2 for each trained factor.

    Args:
        linears: The layers.
        rank (`int`, *optional*): Of a low-rank branch beside each.
        trains_weights (`bool`): Whether dL/dW is formed.
    """
    total = 0
    for linear in linears:
        total += (6 if trains_weights else 4) * linear.numel
        if rank is not None:
            r = min(rank, *linear.shape)
            # x P and B: output and dL/dx of both, dL/dB of the one that trains, on the larger side
            total += 4 * r * sum(linear.shape) + 2 * r * max(linear.shape)
    return total
