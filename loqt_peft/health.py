"""The one place that knows whether a model is in order: everything that can be asked of it, and the answers as one report."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from .findings import Finding


# whose versions a bug report needs
PACKAGES = ("loqt_peft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "trl")


@dataclass(frozen=True)
class Health:
    """What was found.

    Attributes:
        versions (`dict[str, str]`): Of Python and of the packages that are installed.
        devices (`list[str]`): The processor, and each accelerator with its memory.
        adapter (`dict`, *optional*): Name, updates so far, rank, scale, formats, base model; `None` without an adapter.
        weights (`dict`, *optional*): Shares of the model's weights, see [`loqt_peft.weight_shares.WeightShares`].
        findings (`list[Finding]`): What is not in order; empty if nothing is.
    """

    versions: dict[str, str]
    devices: list[str]
    adapter: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def in_order(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> str:
        return json.dumps({"in_order": self.in_order, **asdict(self)}, indent=2)

    def __str__(self) -> str:
        sections = [("versions", self.versions), ("devices", dict(enumerate(self.devices)))]
        sections += [("adapter", self.adapter), ("weights", self.weights)]
        width = max(len(str(key)) for _, rows in sections for key in rows or ())
        lines = []
        for title, rows in sections:
            if rows:
                lines += [title, *(f"  {key!s:<{width}}  {value}" for key, value in rows.items()), ""]
        if self.in_order:
            return "\n".join([*lines, "to mend: nothing"])
        lines.append("to mend")
        for number, finding in enumerate(self.findings, 1):
            lines += [f"  {number}. {finding.severity}: {finding.what}", f"     {finding.remedy}"]
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of Python, the system and the packages of [`PACKAGES`] that are installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def devices() -> list[str]:
    """The processor, and each accelerator with its memory."""
    found = [f"cpu: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB")
    return found
