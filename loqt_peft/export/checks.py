"""What must be in order before anything is converted or written: arguments, model and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..choices import EXPORT_FORMATS
from ..compat import kept_in_float32
from ..layers.find import loqt_layers


# by these files a folder is taken for a model; left beside a new one, some would be loaded in its place
_MODEL_FILES = (
    "config.json",
    "adapter_config.json",
    "model*.safetensors*",
    "adapter_model*.safetensors*",
    "pytorch_model*.bin*",
    "adapter_model*.bin*",
)


def check_output_dir(output_dir: str | Path, overwrite: bool = False, sources: tuple[str | None, ...] = ()) -> Path:
    """The output directory as a path.

    Args:
        output_dir (`str` or `Path`): Where a model is to be written.
        overwrite (`bool`): Whether a model may be there already.
        sources (`tuple` of `str`): Names or paths of what is read; none may be the output directory.

    Raises:
        ValueError: If it is a file, one of the sources, or holds a model that may not be overwritten.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is not allowed: it is a file.")
    if any(source and output_dir.exists() and output_dir.resolve() == Path(source).resolve() for source in sources):
        raise ValueError(
            f"output_dir={str(output_dir)!r} is not allowed: the base model or the adapter is read from it."
        )
    if not overwrite and next(model_files(output_dir), None):
        raise ValueError(f"output_dir={str(output_dir)!r} holds a model already. Ask for overwrite to replace it.")
    return output_dir


def model_files(folder: Path) -> Iterator[Path]:
    """What makes a folder a model."""
    return (file for pattern in _MODEL_FILES for file in folder.glob(pattern))


def check_rank(to: str, rank: int | float | None) -> None:
    """
    Raises:
        ValueError: If `to` is no format, or `rank` not a rank or energy threshold where there must be one.
    """
    if to not in EXPORT_FORMATS:
        raise ValueError(f"to={to!r} is not allowed: one of {', '.join(map(repr, EXPORT_FORMATS))}.")
    if to != "lora":
        if rank is not None:
            raise ValueError(f"rank={rank!r} is not allowed with to={to!r}: only with 'lora' is it chosen.")
        return
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not is_rank and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(
            f"rank={rank!r} is not allowed with to='lora': an integer of at least 1, or a float above 0 and up to 1, the "
            "share of each layer's squared change that its rank must keep."
        )


def check_base_name(to: str, base_name: str | None) -> None:
    """
    Raises:
        ValueError: If a name of the base model is given, and nothing is written that names one.
    """
    if base_name is not None and to != "qlora":
        raise ValueError(
            f"base_name={base_name!r} is not allowed with to={to!r}: only with 'qlora' is a base written."
        )


def active_adapter(tuner: BaseTuner) -> str:
    """The name of the one adapter that is active.

    Raises:
        ValueError: If there is not exactly one with LoQT layers, or the model is in a state that cannot be exported.
    """
    if not isinstance(tuner.model, PreTrainedModel):
        raise ValueError(f"Only transformers models can be exported, and this is a {type(tuner.model).__name__}.")
    adapters = tuner.active_adapters
    if len(adapters) != 1:
        raise ValueError(f"One adapter must be active for an export, and these are: {adapters}. Use `set_adapter`.")
    layers = [layer for _, layer in loqt_layers(tuner.model)]
    for layer in layers:
        layer.verify(adapters[0])
    if any(layer.merged for layer in layers):
        raise ValueError("The adapter is merged into the base weights. Call `unmerge_adapter` before an export.")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("The adapters are disabled. Enable them before an export.")
    if not any(adapters[0] in layer.loqt_B for layer in layers):
        raise ValueError(f"The active adapter {adapters[0]!r} has no LoQT layers, or was exported already.")
    if any(parameter.is_meta for parameter in tuner.model.parameters()):
        raise ValueError("Some weights of the model are offloaded (on the meta device). Load it without offloading.")
    return adapters[0]


def check_base_quantizer(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: If the base model is quantized by anything but bitsandbytes in 4 bits.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, Bnb4BitHfQuantizer):
        raise ValueError(
            f"The base model is quantized by {type(quantizer).__name__}, which only the export to LoRA supports."
        )


def check_loadable_in_4bit(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: If a LoQT layer is one that transformers never loads in 4 bits.
    """
    # transformers leaves these out of the quantization when it loads a model, whatever the checkpoint says
    kept = kept_in_float32(model)
    for name, _ in loqt_layers(model):
        if kept and not should_convert_module(name, kept):
            raise ValueError(
                f"{name!r} cannot be exported in 4 bits: transformers keeps it in float32 in a {type(model).__name__}."
            )


def check_ranks(model: PreTrainedModel, adapter_name: str, rank: int | float) -> None:
    """
    Raises:
        ValueError: If a layer's base weight was dropped, or is too small for the rank.
    """
    for name, layer in loqt_layers(model):
        if adapter_name not in layer.loqt_B:
            continue
        layer.base.require("The export to LoRA")
        if isinstance(rank, int) and rank > min(layer.shape):
            raise ValueError(
                f"rank={rank} is not allowed: the weight of {name!r} has at most rank {min(layer.shape)}. A float gives "
                "each layer a rank of its own."
            )
