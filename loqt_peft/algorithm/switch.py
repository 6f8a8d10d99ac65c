"""The switch of one layer (paper Algorithm 1, lines 5 to 10), as a function of its matrices: nothing is written."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .compensation import compensate
from .precision import without_autocast
from .projection import captured_energy, expand, is_right, project, random_projection, squared_norm
from .quantization import DenseFormat, FourBitFormat


class NewProjection(NamedTuple):
    """What a switch needs of a gradient.

    Attributes:
        P (`torch.Tensor`): The new projection, in its storage format; the old one if the gradient is zero.
        energies (`torch.Tensor`): float32 `[2]`: squared norms of the gradient within the span of P, and of the gradient.
        finite (`torch.Tensor`): 0-d bool; if false, P is of no use.
    """

    P: torch.Tensor
    energies: torch.Tensor
    finite: torch.Tensor


class Switch(NamedTuple):
    """One layer's new state, computed but not yet written.

    Attributes:
        weight (`torch.Tensor`): The requantized weight, in its storage format.
        P (`torch.Tensor`): The projection, in its storage format.
        B (`torch.Tensor`): In the dtype of the trainable matrix.
        statistics (`torch.Tensor`):
            float64 `[6]`: squared norms of the merged s·PB, the merged weight, the quantization error before and after
            compensation, the gradient within the span of P, and the gradient (both zero where none was recorded).
        error (`torch.Tensor`, *optional*):
            With error feedback: W − deq(Q) − s·PB, in the storage format of the weight.
    """

    weight: torch.Tensor
    P: torch.Tensor
    B: torch.Tensor
    statistics: torch.Tensor
    error: torch.Tensor | None = None


@torch.no_grad()
@without_autocast
def projection_of_gradient(
    gradient: torch.Tensor, r: int, method: str, P_old: torch.Tensor, projection_format: FourBitFormat | DenseFormat
) -> NewProjection:
    """From dL/dW to P (paper Algorithm 1, line 7).

    The host waits for the device in the decomposition, of which torch checks whether it converged, and nowhere else.

    Args:
        gradient (`torch.Tensor`): dL/dW at the merged weight, float32 `[out, in]`; used up.
        r (`int`): Rank.
        method (`str`): One of [`~loqt_peft.choices.OF_GRADIENT`].
        P_old (`torch.Tensor`): What stays if the gradient is zero, as `projection_format` packs it.
        projection_format: How P is stored.
    """
    energy = squared_norm(gradient)
    finite = torch.isfinite(energy)
    # a decomposition must not see what is not finite
    gradient.masked_fill_(~finite, 0)
    P = torch.where(energy > 0, projection_format.pack(project(gradient, r, method)), P_old)
    captured = captured_energy(gradient, projection_format.unpack(P))
    return NewProjection(P, torch.stack([captured, energy]), finite)


def drawn_projection(
    shape: tuple[int, int],
    r: int,
    seed: int,
    device: torch.device,
    projection_format: FourBitFormat | DenseFormat,
) -> NewProjection:
    """Random directions, for which no gradient is needed; the energies are zero.

    Args:
        shape (`tuple[int, int]`): Of W, `[out, in]`.
        r (`int`): Rank.
        seed (`int`): The same for the same P.
        device (`torch.device`): Where P will lie.
        projection_format: How it is stored.
    """
    return NewProjection(
        projection_format.pack(random_projection(shape, r, seed, device)),
        torch.zeros(2, dtype=torch.float32, device=device),
        torch.ones((), dtype=torch.bool, device=device),
    )


def low_rank_product(B: torch.Tensor, P: torch.Tensor, scale: float, right: bool) -> torch.Tensor:
    """s·PB, float32 `[out, in]`.

    Args:
        B (`torch.Tensor`): `[out, r]` if `right`, else `[r, in]`.
        P (`torch.Tensor`): float32 `[r, in]` if `right`, else `[out, r]`.
        scale (`float`): s.
        right (`bool`): Whether P is on the input side.
    """
    return expand(P, B.float(), right).mul_(scale)


@torch.no_grad()
@without_autocast
def switch(
    weight: torch.Tensor,
    B: torch.Tensor,
    P_old: torch.Tensor,
    new: NewProjection | None,
    weight_format: FourBitFormat | DenseFormat,
    projection_format: FourBitFormat | DenseFormat,
    scale: float,
    steps: int,
    error: torch.Tensor | None = None,
    error_feedback: bool = False,
) -> Switch:
    """Merge s·PB into W, requantize W, and compensate what that loses by a new B.

    Args:
        weight (`torch.Tensor`): deq(W_q), float32 `[out, in]`; left as it is.
        B (`torch.Tensor`): `[out, r]` if in <= out, else `[r, in]`.
        P_old (`torch.Tensor`): The projection of `B`, as `projection_format` packs it.
        new ([`NewProjection`], *optional*): The projection from now on; `None` keeps the old one.
        weight_format, projection_format: How W and P are stored.
        scale (`float`): s.
        steps (`int`): K, iterations of compensation.
        error (`torch.Tensor`, *optional*): With error feedback what the last switch left over, as `weight_format` packs it.
        error_feedback (`bool`): Whether what this one leaves over is wanted.

    Returns:
        [`Switch`]
    """
    right = is_right(tuple(weight.shape))
    W = low_rank_product(B, projection_format.unpack(P_old), scale, right)
    change = squared_norm(W)
    W.add_(weight)
    del weight
    if error is not None:
        W.add_(weight_format.unpack(error))
    P, energies = (P_old, W.new_zeros(2)) if new is None else (new.P.to(W.device, non_blocking=True), new.energies)
    # P is zero where no gradient has ever come by: B then stays zero
    unpacked = projection_format.unpack(P)
    result = compensate(W, unpacked, weight_format, scale, steps, B.dtype)
    norms = torch.stack([change, squared_norm(W)])
    errors = torch.stack([result.error_before, result.error_after])
    left_over = None
    if error_feedback:
        # of what the forward pass will see
        W.sub_(weight_format.unpack(result.weight)).sub_(low_rank_product(result.B, unpacked, scale, right))
        left_over = weight_format.pack(W)
    return Switch(result.weight, P, result.B, torch.cat([norms, errors, energies]).double(), left_over)
