"""Which optimizer steps are update steps (paper §3.4, "Exponential update frequency")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile


INTERVAL_SCHEDULES = ("exponential", "linear", "constant")


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

    def is_update_step(self, step: int) -> bool:
        """Whether `step` (the number of optimizer steps already taken, as the Trainer's `global_step`) is a T_i."""
        if self.kind == "constant":
            return step % self.gap(0) == 0
        return bool(self.update_steps(step + 1, start=step))
