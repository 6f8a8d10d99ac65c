"""Modules and names that have moved: they go on working where they were, with a `DeprecationWarning`."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


# since 0.2.0, all within the package; old module -> where its names are now, in the order in which they are looked for
MOVED = {
    "checkpoint": ("saving.seal", "saving.verify", "saving.checkpoints"),
    "closed_form": ("memory.closed_form", "memory.options", "memory.shape", "choices"),
    "compensation": ("algorithm.compensation",),
    "estimate_cli": ("cli.estimate",),
    "functional": ("algorithm.linear_map",),
    "layer": ("layers.layer", "layers.linear", "layers.base_weight", "algorithm.switch", "layers.update_state"),
    "model_card": ("saving.model_card",),
    "optim": ("training.per_layer",),
    "performance": ("training.performance",),
    "projection": ("algorithm.projection", "choices"),
    "quantization": ("algorithm.quantization", "choices"),
    "schedule": ("algorithm.schedule", "choices"),
    "simulation": ("memory.simulation", "memory.counter", "memory.simulated_model"),
    "target_modules": ("layers.target_modules",),
    "update": ("training.update", "training.figures", "training.optimizer_state", "layers.find"),
}
# of those; old name -> new name
RENAMED = {
    "METHODS": "ESTIMATED_METHODS",
    "OPTIMIZERS": "ESTIMATED_OPTIMIZERS",
    "Projected": "NewProjection",
}
# module that has stayed -> a name that has left it -> its name now
MOVED_NAMES = {
    "__main__": {
        "AUTO_CLASSES": "cli.adapter.AUTO_CLASSES",
        "DTYPES": "choices.DTYPES",
        "base_class": "cli.adapter.base_class",
        "build_parser": "cli.main.build_parser",
        "copy_tokenizer": "cli.adapter.copy_tokenizer",
        "export_command": "cli.export.export_command",
        "load_base": "cli.adapter.load_base",
        "parse_rank": "cli.export.parse_rank",
        "return_freed_memory": "cli.export.return_freed_memory",
        "trained_quantization": "cli.adapter.trained_quantization",
    },
    "callback": {"REFUSED": "health.REFUSED"},
    "config": {
        "INTERVAL_SCHEDULES": "choices.INTERVAL_SCHEDULES",
        "OPTIMIZER_STATES": "choices.OPTIMIZER_STATES",
        "PROJECTIONS": "choices.PROJECTIONS",
        "QUANT_TYPES": "choices.QUANT_TYPES",
        "RETAIN_BASE": "choices.RETAIN_BASE",
        "UPDATE_MODES": "choices.UPDATE_MODES",
    },
    "export": {"FORMATS": "choices.EXPORT_FORMATS"},
    "memory": {
        "LARGEST_PLANNED_BATCH": "memory.plan.LARGEST_PLANNED_BATCH",
        "PLANNED_OPTIONS": "memory.plan.PLANNED_OPTIONS",
        "SMALLEST_PLANNED_RANK": "memory.plan.SMALLEST_PLANNED_RANK",
        "UNITS": "memory.estimate.UNITS",
        "closed_form_peak": "memory.estimate.closed_form_peak",
    },
    "model": {"SUPPORTED": "layers.target_checks.SUPPORTED"},
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
                for found in (name, RENAMED.get(name, name)):
                    if hasattr(room, found):
                        return getattr(room, found)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = look_up


def moved_names(module: str) -> Callable[[str], Any]:
    """What a module that has stayed takes as its `__getattr__`, so that names which have left it are found."""
    moved = MOVED_NAMES[module.rpartition(".")[2]]

    def look_up(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        room, _, new = moved[name].rpartition(".")
        warnings.warn(
            f"{name} of {module} has moved: it is {__package__}.{moved[name]}.", DeprecationWarning, stacklevel=2
        )
        return getattr(importlib.import_module(f"{__package__}.{room}"), new)

    return look_up


def forward_moved_modules() -> None:
    """Find modules under their old names from now on."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
