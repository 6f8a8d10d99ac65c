"""LoQT (arXiv 2405.16528) for Hugging Face PEFT. Importing it registers the tuner type `LOQT`."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ._moved import forward_moved_modules
from ._version import __version__


if TYPE_CHECKING:
    from .callback import LoQTTrainerCallback
    from .config import LoQTConfig
    from .findings import LoQTWarning
    from .memory import estimate_memory, plan_memory
    from .model import LoQTModel
    from .packed_base.config import LoQTQuantizationConfig
    from .packed_base.model import pack_model
    from .saving.checkpoints import get_last_checkpoint
    from .training.per_layer import per_layer, per_layer_optimizer
    from .training.performance import PerformanceCallback
    from .training.sharding import prepare_model_for_fully_shard

# public name -> the module that it is imported from when it is first asked for
_MODULES = {
    "LoQTConfig": "config",
    "LoQTModel": "model",
    "LoQTQuantizationConfig": "packed_base.config",
    "LoQTTrainerCallback": "callback",
    "LoQTWarning": "findings",
    "PerformanceCallback": "training.performance",
    "estimate_memory": "memory",
    "get_last_checkpoint": "saving.checkpoints",
    "pack_model": "packed_base.model",
    "per_layer": "training.per_layer",
    "per_layer_optimizer": "training.per_layer",
    "plan_memory": "memory",
    "prepare_model_for_fully_shard": "training.sharding",
}

__all__ = [
    "LoQTConfig",
    "LoQTModel",
    "LoQTQuantizationConfig",
    "LoQTTrainerCallback",
    "LoQTWarning",
    "PerformanceCallback",
    "__version__",
    "estimate_memory",
    "get_last_checkpoint",
    "pack_model",
    "per_layer",
    "per_layer_optimizer",
    "plan_memory",
    "prepare_model_for_fully_shard",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Make PEFT know the tuner type `LOQT`. `import loqt_peft` has done so, but for the command line.

    Raises:
        ImportError: If a package that this one needs is too old; it says which, and what is needed.
    """
    from .requirements import check_requirements

    # before anything of theirs is imported: what is too old may fail there with an obscure error, or later with none
    check_requirements()
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    from .compat import add_peft_type

    add_peft_type("LOQT")
    from .config import LoQTConfig
    from .model import LoQTModel
    from .packed_base.quantizer import register as register_quantizer
    from .saving.model_card import describe_saved_adapter

    register_quantizer()

    if describe_saved_adapter not in LoQTConfig.on_saved:
        LoQTConfig.on_saved.append(describe_saved_adapter)
    if PEFT_TYPE_TO_TUNER_MAPPING.get("LOQT") is not LoQTModel:
        register_peft_method(name="loqt", config_cls=LoQTConfig, model_cls=LoQTModel)


def _is_command_line() -> bool:
    # `python -m loqt_peft` imports this package while it looks for `__main__`, and says so by this name of the program
    return Path(sys.argv[0] if sys.argv else "").name in ("-m", "loqt", "loqt.exe")


forward_moved_modules()
# the import takes seconds, which `loqt --help` need not wait for
if not _is_command_line():
    register()
