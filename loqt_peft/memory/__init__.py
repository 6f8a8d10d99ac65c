"""How much memory training takes, predicted: in formulas, or by running it on torch's meta device."""

from importlib import import_module
from typing import TYPE_CHECKING

from .._moved import moved_names


if TYPE_CHECKING:
    from .estimate import (
        CONTEXT_BYTES,
        FRAGMENTATION,
        Lever,
        MemoryEstimate,
        estimate_memory,
        parse_bytes,
        required_bytes,
    )
    from .plan import MemoryPlan, plan_memory

# public name -> the module that it is imported from when it is first asked for: transformers takes seconds, and options none
_MODULES = {
    "CONTEXT_BYTES": "estimate",
    "FRAGMENTATION": "estimate",
    "Lever": "estimate",
    "MemoryEstimate": "estimate",
    "MemoryPlan": "plan",
    "estimate_memory": "estimate",
    "parse_bytes": "estimate",
    "plan_memory": "plan",
    "required_bytes": "estimate",
}

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

_moved_name = moved_names(__name__)


def __getattr__(name: str):
    if name not in _MODULES:
        return _moved_name(name)
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
