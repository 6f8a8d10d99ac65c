"""What the products of an adapted layer cost in each of the ways to compute them, and which way costs least."""

from __future__ import annotations

from .projection import is_right


# BRANCH: W and s·PB are multiplied with x one by one. Else their sum is, and B's gradient is `gᵀ (x Pᵀ)` with thin
# products only (THIN), or `(gᵀ x) Pᵀ` by way of the weight's gradient (WEIGHT); on the output side `(g P)ᵀ x` or `Pᵀ (gᵀ x)`.
BRANCH, THIN, WEIGHT = "branch", "thin", "weight"


def operations(
    rows: int,
    shape: tuple[int, int],
    r: int,
    needs_x: bool = True,
    needs_B: bool = True,
    records: bool = False,
) -> dict[str, int]:
    r"""Floating operations of a layer's products, forward and backward, by each of the ways to compute them.

    With n rows, m = out · in, and `[·]` for what only a gradient of B, of x or of W asks for:

    | | forward | gradient of x | gradient of B | gradient of W, recorded |
    |---|---|---|---|---|
    | branch | n m + n r (out + in) | [n m + n r (out + in)] | [n r max(out, in)] | [n m] |
    | thin | n m + r m | [n m + r m] | [n r (out + in)] | [n m] |
    | weight | n m + r m | [n m + r m] | [n m + r m] | 0 |

    all times two, for a multiplication and an addition. Without a gradient of x a branch on the output side also lacks
    `g P`, n r out. What dequantization takes is the same for all.

    Args:
        rows (`int`): n, of x.
        shape (`tuple[int, int]`): Of W, `[out, in]`.
        r (`int`): Rank.
        needs_x, needs_B (`bool`): Which gradients are wanted.
        records (`bool`): Whether dL/dW is wanted too.

    Returns:
        `dict[str, int]`: Of "branch", "thin" and "weight", in this order.
    """
    (out, inner), right = shape, is_right(shape)
    dense, merging = rows * out * inner, r * out * inner
    both = rows * r * (out + inner)
    passes = 1 + needs_x
    branch, merged = passes * (dense + both), passes * (dense + merging)
    thin = weight = merged
    if needs_B:
        branch += rows * r * max(out, inner) + (0 if right or needs_x else rows * r * out)
        thin += both
        weight += merging
    if records:
        branch += dense
        thin += dense
    if records or needs_B:
        weight += dense
    return {BRANCH: 2 * branch, THIN: 2 * thin, WEIGHT: 2 * weight}


def cheapest(*args, **kwargs) -> str:
    """The way with the fewest [`operations`], which takes the same arguments; of equals the first.

    The ways differ by rounding only, so processes whose batches differ in shape need not agree on one.
    """
    counted = operations(*args, **kwargs)
    return min(counted, key=counted.get)


def keeps_input(way: str, shape: tuple[int, int], r: int) -> bool:
    """Whether x is kept for the gradient of B, and not `x Pᵀ`, n r.

    Neighbours (query, key and value; gate and up) share one x, so it is the smaller from r = in / 2 on. Separate products
    have made `x Pᵀ` for the output already.
    """
    return not is_right(shape) or way == WEIGHT or (way == THIN and 2 * r > shape[1])
