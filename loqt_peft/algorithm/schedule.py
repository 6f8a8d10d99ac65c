"""Which optimizer steps are update steps (paper §3.4, "Exponential update frequency")."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class UpdateSchedule:
    r"""The update steps T_0 = 0, T_{i+1} = T_i + gap_i, as a pure function of the optimizer step.

    | `kind`          | gap_i        |
    |-----------------|--------------|
    | `"exponential"` | τ + ⌊ψ^i⌋    |
    | `"linear"`      | τ + ⌊ψ·i⌋    |
    | `"constant"`    | τ            |

    Args:
        interval (`int`): τ, in optimizer steps.
        kind (`str`): How the gap grows.
        growth (`float`): ψ. Ignored by `"constant"`.
        max_interval (`int`, *optional*): Cap on the gap, in optimizer steps.
    """

    interval: int = 100
    kind: str = "exponential"
    growth: float = 1.2
    max_interval: int | None = None

    def gap(self, i: int) -> int:
        """Steps between update i and update i + 1."""
        if self.kind == "exponential":
            # ψ^i overflows a float for large i; by then the gap is beyond any training run.
            try:
                gap = self.interval + int(self.growth**i)
            except OverflowError:
                gap = 2**63
        elif self.kind == "linear":
            gap = self.interval + int(self.growth * i)
        else:
            gap = self.interval
        return gap if self.max_interval is None else min(gap, self.max_interval)

    def _steps(self) -> Iterator[int]:
        step, i = 0, 0
        while True:
            yield step
            step += self.gap(i)
            i += 1

    def update_steps(self, stop: int, start: int = 0) -> list[int]:
        """All update steps T_i with `start` <= T_i < `stop`, in order."""
        return [step for step in takewhile(lambda step: step < stop, self._steps()) if step >= start]

    @property
    def smallest_gap(self) -> int:
        """The smallest number of steps between two updates; no gap is smaller than the first."""
        return self.gap(0)

    def is_update_step(self, step: int) -> bool:
        """Whether `step` (the number of optimizer steps already taken, as the Trainer's `global_step`) is a T_i."""
        if self.kind == "constant":
            return step % self.gap(0) == 0
        return bool(self.update_steps(step + 1, start=step))


def staggered_offsets(names: list[str], limit: int) -> list[int]:
    """By how many steps the update of each layer is put off, so that one block of the model switches at a time.

    Layers belong to one block if their names agree up to their first number, as in `model.layers.3`; a layer without a
    number is one by itself. Where there are more blocks than `limit`, neighbours share a step.

    Args:
        names (`list[str]`): Names of the layers, in the order of the model.
        limit (`int`): Largest number of different offsets: the smallest gap between updates.
    """
    blocks: dict[str, int] = {}
    indices = []
    for name in names:
        parts = name.split(".")
        end = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
        indices.append(blocks.setdefault(".".join(parts[: end + 1]), len(blocks)))
    shared = math.ceil(len(blocks) / limit)
    return [index // shared for index in indices]
