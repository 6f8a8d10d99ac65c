"""The measurements: in which order, with which budget, and where their code is.

In the order of worth: of ten minutes the first six take all. Needs nothing but Python; the code is imported by the process
that measures.
"""

from __future__ import annotations

from dataclasses import dataclass


# of the small form on the CPU, where every measurement only has to end
TINY_SECONDS = 300


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        name (`str`): Under which results are kept.
        place (`str`): Module of this package and function in it.
        seconds (`int`): Budget.
        what (`str`): What it measures, in a sentence.
    """

    name: str
    place: str
    seconds: int
    what: str


MEASUREMENTS = (
    Measurement(
        "operations",
        "correctness:operations",
        120,
        "The same operations on the device and on the CPU, in all formats, and what only a device can get wrong.",
    ),
    Measurement(
        "late_copy",
        "correctness:late_copy",
        45,
        "A gradient that is copied to the host late, behind a kernel that sleeps: nobody may read it early.",
    ),
    Measurement(
        "nccl_resume",
        "resume:nccl_resume",
        75,
        "DDP of one process with the Trainer resumes from a checkpoint whose weights have switched.",
    ),
    Measurement(
        "memory_7b",
        "memory:memory_7b",
        150,
        "LLaMA-7B, r 1024, 8-bit AdamW, 256 tokens: memory of an ordinary step, of the first update and of a later one.",
    ),
    Measurement(
        "kernels",
        "kernels:kernels",
        90,
        "Seconds of qr, eigh, svd, pack and compensate at 4096 x 4096 and 11008 x 4096, r 1024, TF32 off and on.",
    ),
    Measurement(
        "update_parts",
        "update_parts:update_parts",
        120,
        "Seconds of an update of LLaMA-7B: projection, compensation, copies.",
    ),
    Measurement(
        "memory_13b",
        "memory:memory_13b",
        180,
        "LLaMA-13B with per-layer updates, r 1024, 256 tokens: memory as of 7B.",
    ),
    Measurement(
        "speed_1b",
        "speed:speed_1b",
        240,
        "LLaMA-1B: tokens a second of full AdamW, 8-bit per-layer AdamW, QLoRA and LoQT before and after its first switch.",
    ),
    Measurement("memory_7b_long", "memory:memory_7b_long", 120, "LLaMA-7B with 1,280 tokens: memory as with 256."),
    Measurement(
        "memory_7b_per_layer",
        "memory:memory_7b_per_layer",
        120,
        "LLaMA-7B with per-layer updates, 256 tokens: memory, and whether 16 GiB are enough.",
    ),
    Measurement(
        "learning_60m",
        "learning:learning_60m",
        420,
        "LLaMA-60M, 131,072 tokens a step: LoQT and full-rank AdamW on equal data.",
    ),
    Measurement(
        "suite",
        "correctness:suite",
        240,
        "The short form of the test suite with no device visible, with the versions of this machine.",
    ),
)


def by_name(names: list[str] | None) -> list[Measurement]:
    """The named measurements, or all, in the order of worth.

    Raises:
        ValueError: If there is none of that name.
    """
    known = {measurement.name: measurement for measurement in MEASUREMENTS}
    for name in names or []:
        if name not in known:
            raise ValueError(f"{name!r} is not a measurement: {', '.join(known)}.")
    return [measurement for measurement in MEASUREMENTS if not names or measurement.name in names]


def affordable(wanted: list[Measurement], seconds: float, tiny: bool = False) -> list[Measurement]:
    """What of `wanted` ends within `seconds` if each takes its budget: in order, passing over what is too long."""
    chosen = []
    for measurement in wanted:
        cost = TINY_SECONDS if tiny else measurement.seconds
        if cost <= seconds:
            chosen.append(measurement)
            seconds -= cost
    return chosen
