"""What an export wrote, and what it lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what it lost. The errors are those of the LoQT layers, all of them together.

    Attributes:
        to (`str`): One of `"dense"`, `"bnb-4bit"`, `"qlora"` and `"lora"`.
        output_dir (`str`): Where it was written.
        layers (`int`): How many LoQT layers were converted.
        weight_error (`float`):
            ‖W − Ŵ‖ / ‖W‖ of the adapted weights W and the exported weights Ŵ, Frobenius norms.
        change_error (`float`, *optional*):
            The same error relative to the adapter's change of the original base weights: ‖W − Ŵ‖ / ‖ΔW‖. At 1 and above
            nothing of the change can be relied on. `None` if the base weights were dropped.
        ranks (`dict[str, int]`): Of a LoRA adapter, layer name -> rank.
    """

    to: str
    output_dir: str
    layers: int
    weight_error: float
    change_error: float | None
    ranks: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.layers} LoQT layers exported as {self.to} to {self.output_dir}"]
        if self.ranks:
            smallest, largest = min(self.ranks.values()), max(self.ranks.values())
            lines.append(f"rank: {smallest}" if smallest == largest else f"rank: {smallest} to {largest}")
        lines.append(f"error relative to the weights: {self.weight_error:.3g}")
        if self.change_error is not None:
            lines.append(f"error relative to the change of the original weights: {self.change_error:.3g}")
        return "\n".join(lines)


class Errors:
    """Sums of squared norms over the layers."""

    def __init__(self) -> None:
        self.error = self.weight = self.change = 0.0
        self.change_known = True

    def add(self, error: torch.Tensor, weight: torch.Tensor, change: torch.Tensor | None) -> None:
        self.error += _squared_norm(error)
        self.weight += _squared_norm(weight)
        if change is None:
            self.change_known = False
        else:
            self.change += _squared_norm(change)

    def relative_to(self, reference: float) -> float:
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / reference) if reference else math.inf

    def report(self, to: str, output_dir: Path, layers: int, ranks: dict[str, int]) -> ExportReport:
        change_error = self.relative_to(self.change) if self.change_known else None
        return ExportReport(to, str(output_dir), layers, self.relative_to(self.weight), change_error, ranks)


def _squared_norm(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2
