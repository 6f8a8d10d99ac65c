"""`plan_memory`: what fits a device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from .estimate import (
    MemoryEstimate,
    closed_form_peak,
    estimate_memory,
    memory_options,
    parse_bytes,
    required_bytes,
)
from .options import MemoryOptions
from .shape import ModelShape, load_config


# a plan tries ranks from half the hidden size downwards: a larger B would be no smaller than W
SMALLEST_PLANNED_RANK = 8
LARGEST_PLANNED_BATCH = 64
PLANNED_OPTIONS = {
    "double_quant": (False, True),
    "optimizer": ("adamw", "adamw_8bit"),
    "per_layer": (False, True),
    "gradient_checkpointing": (False, True),
}


@dataclass(frozen=True)
class MemoryPlan:
    """What fits a device; predicted.

    Attributes:
        budget (`int`): Bytes of the device.
        fitting (`tuple[MemoryEstimate]`):
            Largest rank first, then fewest options that slow training down, then largest batch.
        smallest ([`MemoryEstimate`]): Of everything tried the one that needs least, whether or not it fits.
    """

    budget: int
    fitting: tuple[MemoryEstimate, ...]
    smallest: MemoryEstimate

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "predicted": True,
            "budget_bytes": self.budget,
            "fitting": [estimate.to_dict() for estimate in self.fitting],
            "smallest": self.smallest.to_dict(),
        }


def plan_memory(
    model: Any,
    budget: str | float,
    *,
    limit: int = 10,
    simulate: bool = False,
    all_layers: bool = False,
    **options: Any,
) -> MemoryPlan:
    """Search rank, batch size, 8-bit optimizer, double quantization, per-layer updates and checkpointing for what fits.

    Ranks are halved from half the hidden size on, batch sizes doubled from 1. Options that are given are kept. Of settings
    that differ in nothing but the batch, the largest that fits is listed.

    Args:
        model: See [`estimate_memory`].
        budget (`str` or `float`):
            Memory of the device, as in [`estimate_memory`]; the assumed margins are taken off.
        limit (`int`): How many settings to return.
        simulate (`bool`): Check the first of them by simulation; what then does not fit is left out.
        all_layers (`bool`): See [`estimate_memory`].
        **options: Fields of [`~loqt_peft.memory.options.MemoryOptions`].

    Returns:
        [`MemoryPlan`]

    Raises:
        ValueError, OSError: See [`estimate_memory`].
    """
    budget = parse_bytes(budget)
    memory_options(options)
    config, name = load_config(model)
    shape = ModelShape.from_config(config, name)
    found, smallest = [], None
    for candidate in _candidates(shape, options):
        peak = closed_form_peak(shape, candidate)
        if smallest is None or peak < smallest[0]:
            smallest = peak, candidate
        if required_bytes(peak) <= budget:
            found.append(candidate)
    best: dict[tuple, MemoryOptions] = {}
    for candidate in sorted(found, key=lambda c: -c.batch_size):
        best.setdefault((candidate.rank, *(getattr(candidate, name) for name in PLANNED_OPTIONS)), candidate)
    ordered = sorted(best.values(), key=lambda c: (-c.rank, _slow_downs(c), -c.batch_size))[:limit]

    def estimate(candidate: MemoryOptions, by_simulation: bool = False) -> MemoryEstimate:
        return estimate_memory(
            config, budget=f"{budget}B", simulate=by_simulation, all_layers=all_layers, **asdict(candidate)
        )

    fitting = [replace(estimate(candidate), model=name) for candidate in ordered]
    while simulate and fitting:
        checked = replace(estimate(fitting[0].options, True), model=name)
        if checked.fits:
            fitting[0] = checked
            break
        fitting.pop(0)
    return MemoryPlan(budget, tuple(fitting), replace(estimate(smallest[1]), model=name))


def _slow_downs(options: MemoryOptions) -> int:
    quick = {name: values[0] for name, values in PLANNED_OPTIONS.items()}
    return sum(getattr(options, name) != value for name, value in quick.items())


def _candidates(shape: ModelShape, options: dict[str, Any]) -> Iterator[MemoryOptions]:
    ranks = [rank for k in range(1, 20) if (rank := shape.hidden >> k) >= SMALLEST_PLANNED_RANK] or [1]
    ranges = {name: values for name, values in PLANNED_OPTIONS.items() if name not in options}
    if options.get("method", "loqt") not in ("loqt", "qlora"):
        ranges.pop("double_quant", None)
    if "rank" not in options and options.get("method") != "full":
        ranges["rank"] = ranks
    if "batch_size" not in options:
        ranges["batch_size"] = [2**k for k in range(LARGEST_PLANNED_BATCH.bit_length())]
    for values in itertools.product(*ranges.values()):
        yield MemoryOptions(**options, **dict(zip(ranges, values, strict=True)))
