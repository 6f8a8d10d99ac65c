"""What an update did, in figures, and what they tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..findings import Finding
from ..layers.stopwatch import Stretch


# Of `change_to_error`. Below it less than half of a change was seen to arrive in the weights, and without compensation next to
# nothing; healthy runs, whose learning rate falls to a tenth, end at 1.1 to 2.
SMALLEST_CHANGE_TO_ERROR = 1.0


class Worded(int):
    """A number for programs that the console shows in words, since there it is printed by its `repr`.

    Args:
        value (`int`): The number.
        words (`str`): What people read.
    """

    words: str

    def __new__(cls, value: int, words: str) -> Worded:
        self = super().__new__(cls, value)
        self.words = words
        return self

    def __repr__(self) -> str:
        return self.words

    def __reduce__(self) -> tuple:
        return int, (int(self),)


@dataclass(frozen=True)
class LoQTUpdate:
    """Figures of the update of a step; norms are Frobenius norms over all layers that were updated together.

    Attributes:
        num_updates (`int`): Updates so far, this one included.
        merged_change (`float`): ‖s·PB‖ / ‖W‖ of what was merged.
        quantization_error_before (`float`): ‖W − deq(q(W))‖ / ‖W‖, before compensation.
        quantization_error_after (`float`): ‖W − deq(Q) − s·PB‖ / ‖W‖, after compensation.
        change_to_error (`float`, *optional*):
            `merged_change` / `quantization_error_after`: how what was merged compares with what was lost. `None` where nothing
            was merged, as in the first update, or nothing was lost (`quantize_weight=None`).
        gradient_energy (`float`, *optional*):
            Share of ‖G‖² that lies in the span of the (quantized) P; `None` with `projection="random"`, which needs no G.
        seconds (`float`):
            Time of the update itself: of making P, within the backward pass or after it, and of the switch of all layers. On
            an accelerator it is the device's own time, by events in its stream, without what had been queued before. Layers on
            several devices: that of the device that took longest. With several processes, exchange and waiting for the
            others are part of it.
    """

    num_updates: int
    merged_change: float
    quantization_error_before: float
    quantization_error_after: float
    gradient_energy: float | None
    seconds: float

    @property
    def change_to_error(self) -> float | None:
        if not self.merged_change or not self.quantization_error_after:
            return None
        return self.merged_change / self.quantization_error_after

    def metrics(self) -> dict[str, float]:
        """The figures that there are, under the names by which they are logged."""
        merged = self.num_updates > 1 or self.merged_change
        figures = {
            "loqt/updates": self.num_updates if merged else Worded(self.num_updates, f"{self.num_updates} (P taken)"),
            "loqt/merged_change": self.merged_change if merged else None,
            "loqt/quantization_error_before": self.quantization_error_before,
            "loqt/quantization_error_after": self.quantization_error_after,
            "loqt/change_to_error": self.change_to_error,
            "loqt/gradient_energy": self.gradient_energy,
            "loqt/seconds": self.seconds,
        }
        return {name: figure for name, figure in figures.items() if figure is not None}


def figures_of(
    statistics: list[list[float]],
    num_updates: int,
    needs_gradient: bool,
    work: list[tuple[torch.device, Stretch]],
) -> LoQTUpdate:
    """The figures of an update.

    Args:
        statistics (`list[list[float]]`): Of each layer, see [`~loqt_peft.algorithm.switch.Switch`].
        num_updates (`int`): Updates so far, this one included.
        needs_gradient (`bool`): Whether P was made from gradients.
        work: What was done on which device.
    """
    change, weight, before, after, captured, gradient = (sum(column) for column in zip(*statistics, strict=True))

    def relative(squared: float) -> float:
        return (squared / weight) ** 0.5 if weight else 0.0

    energy = captured / gradient if gradient else 0.0
    return LoQTUpdate(
        num_updates=num_updates,
        merged_change=relative(change),
        quantization_error_before=relative(before),
        quantization_error_after=relative(after),
        gradient_energy=energy if needs_gradient else None,
        seconds=_seconds(work),
    )


def _seconds(work: list[tuple[torch.device, Stretch]]) -> float:
    by_device: dict[torch.device, float] = {}
    for device, stretch in work:
        by_device[device] = by_device.get(device, 0.0) + stretch.seconds()
    return max(by_device.values())


def noise_findings(update: LoQTUpdate, error_feedback: bool) -> list[Finding]:
    """Whether what an update has merged is lost in what quantization makes of it.

    Args:
        update ([`LoQTUpdate`]): What it did.
        error_feedback (`bool`): Whether what was lost is kept, and merged later.
    """
    ratio = update.change_to_error
    if ratio is None or ratio >= SMALLEST_CHANGE_TO_ERROR or error_feedback:
        return []
    return [
        Finding(
            "warning",
            "change_lost_in_quantization",
            f"Update {update.num_updates} merged a change of {update.merged_change:.3g} of the weights' norm, and quantizing "
            f"them lost {update.quantization_error_after:.3g}, which is more (change_to_error={ratio:.2f}): little of what "
            "was learned arrives in the weights.",
            "A higher learning rate or loqt_alpha, a longer update_interval, or error_feedback=True helps.",
        )
    ]
