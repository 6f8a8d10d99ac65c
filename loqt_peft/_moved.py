"""Modules that have moved: their old names go on working, with a `DeprecationWarning`."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


# since 0.2.0; old name -> where its names are now, all within the package
MOVED = {
    "checkpoint": ("saving.seal", "saving.verify", "saving.checkpoints"),
    "closed_form": ("memory.closed_form",),
    "compensation": ("algorithm.compensation",),
    "estimate_cli": ("cli.estimate",),
    "functional": ("algorithm.linear_map",),
    "layer": ("layers.layer",),
    "model_card": ("saving.model_card",),
    "optim": ("training.per_layer",),
    "performance": ("training.performance",),
    "projection": ("algorithm.projection",),
    "quantization": ("algorithm.quantization",),
    "schedule": ("algorithm.schedule",),
    "simulation": ("memory.simulation",),
    "target_modules": ("layers.target_modules",),
    "update": ("training.update",),
}


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path, target=None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def exec_module(self, module) -> None:
        rooms = [f"{__package__}.{new}" for new in MOVED[module.__name__.rpartition(".")[2]]]
        warnings.warn(
            f"The module {module.__name__} has moved to {' and '.join(rooms)}.", DeprecationWarning, stacklevel=2
        )

        def look_up(name: str):
            for room in map(importlib.import_module, rooms):
                if hasattr(room, name):
                    return getattr(room, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = look_up


def forward_moved_modules() -> None:
    """Find modules under their old names from now on."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
