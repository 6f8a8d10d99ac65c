"""LoQT (arXiv 2405.16528) for Hugging Face PEFT. Importing it registers the tuner type `LOQT`."""

from .requirements import check_requirements


# before anything of theirs is imported: what is too old may fail there with an obscure error, or later with none
check_requirements()

from peft.utils import PeftType, register_peft_method  # noqa: E402

from ._version import __version__  # noqa: E402


def _register_peft_type() -> None:
    # PEFT has no public way to add a type. Only what every version's enum has is touched, and a member that PEFT may one
    # day have of its own is used as it is.
    if "LOQT" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "LOQT")
    member._name_ = member._value_ = "LOQT"
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, "LOQT", member)
    PeftType._member_names_.append("LOQT")
    PeftType._member_map_["LOQT"] = member
    PeftType._value2member_map_["LOQT"] = member


_register_peft_type()

from .callback import LoQTTrainerCallback  # noqa: E402
from .checkpoint import get_last_checkpoint  # noqa: E402
from .config import LoQTConfig  # noqa: E402
from .memory import estimate_memory, plan_memory  # noqa: E402
from .model import LoQTModel  # noqa: E402
from .optim import per_layer, per_layer_optimizer  # noqa: E402
from .performance import PerformanceCallback  # noqa: E402


register_peft_method(name="loqt", config_cls=LoQTConfig, model_cls=LoQTModel)

__all__ = [
    "LoQTConfig",
    "LoQTModel",
    "LoQTTrainerCallback",
    "PerformanceCallback",
    "__version__",
    "estimate_memory",
    "get_last_checkpoint",
    "per_layer",
    "per_layer_optimizer",
    "plan_memory",
]
