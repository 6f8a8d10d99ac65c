"""How much memory training takes, predicted: in formulas, or by running it on torch's meta device."""

from .estimate import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    Lever,
    MemoryEstimate,
    MemoryPlan,
    estimate_memory,
    parse_bytes,
    plan_memory,
    required_bytes,
)


__all__ = [
    "CONTEXT_BYTES",
    "FRAGMENTATION",
    "Lever",
    "MemoryEstimate",
    "MemoryPlan",
    "estimate_memory",
    "parse_bytes",
    "plan_memory",
    "required_bytes",
]
