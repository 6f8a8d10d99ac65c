"""`python -m loqt_peft`: what can be done from the command line."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel
from peft.auto import check_import_allowlist, get_default_import_allowlist
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from .checkpoint import saved_base_quantization
from .config import LoQTConfig
from .estimate_cli import add_estimate_parser
from .export import FORMATS, check_output_dir, check_rank


AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# of glibc's malloc.h
_M_MMAP_THRESHOLD = -3
DTYPES = ("auto", "float32", "bfloat16", "float16")


def base_class(config: LoQTConfig) -> type:
    """The class that loads an adapter's base model: by its task type, else the class it was trained with.

    Raises:
        ValueError: If that class is not one of transformers.
    """
    if config.task_type is None and config.auto_mapping:
        library, name = config.auto_mapping["parent_library"], config.auto_mapping["base_model_class"]
        if not check_import_allowlist(get_default_import_allowlist(), library):
            raise ValueError(
                f"The adapter's base model is a {name} of {library!r}, which is not imported from a config."
            )
        return getattr(importlib.import_module(library), name)
    return getattr(transformers, AUTO_CLASSES.get(config.task_type, "AutoModelForCausalLM"))


def load_base(
    config: LoQTConfig,
    name_or_path: str,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The base model of an adapter.

    Args:
        config (`LoQTConfig`): The adapter's.
        name_or_path (`str`): Of the base model; the revision is the config's if it is the config's model.
        dtype (`str` or `torch.dtype`): As in transformers; `"auto"` is the checkpoint's.
        device (`str`): Where to load it.
        quantization_config (`BitsAndBytesConfig`, *optional*): How it was quantized when the adapter was trained.
    """
    kwargs = {"dtype": dtype, "quantization_config": quantization_config}
    if name_or_path == config.base_model_name_or_path and config.revision:
        kwargs["revision"] = config.revision
    if torch.device(device).type != "cpu":
        kwargs["device_map"] = {"": device}
    return base_class(config).from_pretrained(name_or_path, **kwargs)


def trained_quantization(adapter: str, revision: str | None = None) -> BitsAndBytesConfig | None:
    """How the base model was quantized when an adapter was trained; `None` if it was dense.

    Args:
        adapter (`str`): Folder or Hub name.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
    """
    path = Path(adapter) / SAFETENSORS_WEIGHTS_NAME
    if not Path(adapter).is_dir():
        path = hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME, revision=revision)
    quantization = saved_base_quantization(path)
    if quantization is None:
        return None
    quant_type, double_quant = quantization
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )


def copy_tokenizer(output_dir: Path, *sources: str, revision: str | None = None) -> str | None:
    """Save the tokenizer of the first source that has one, and return that source."""
    for source in sources:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        except (OSError, ValueError, KeyError, ImportError):
            # a revision is the adapter's, which comes first
            revision = None
            continue
        tokenizer.save_pretrained(output_dir)
        return source
    return None


def return_freed_memory() -> None:
    """Have glibc hand freed tensors back to the system, in this whole process; nothing with another C library."""
    # it stops doing so by itself after the first large ones, and an export to 4 bits then peaks at nearly twice the model
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def export_command(options: argparse.Namespace) -> None:
    """Export a saved adapter, and print what that lost."""
    check_rank(options.to, options.rank)
    return_freed_memory()
    config = PeftConfig.from_pretrained(options.adapter, revision=options.revision)
    if not isinstance(config, LoQTConfig):
        raise ValueError(f"{options.adapter!r} is an adapter of type {config.peft_type.value}, not LoQT.")
    base = options.base_model or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{options.adapter!r} does not say what its base model is. Pass --base-model.")
    output_dir = check_output_dir(options.output_dir, options.overwrite, (options.adapter, base))

    quantization_config = trained_quantization(options.adapter, options.revision)
    model = load_base(config, base, options.dtype, options.device, quantization_config)
    model = PeftModel.from_pretrained(model, options.adapter, revision=options.revision)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    report = model.export(
        output_dir, options.to, rank=options.rank, dtype=dtype, overwrite=options.overwrite, progressbar=True
    )
    print(report)
    tokenizer = copy_tokenizer(output_dir, options.adapter, base, revision=options.revision)
    print("no tokenizer found" if tokenizer is None else f"tokenizer: {tokenizer}")


def parse_rank(text: str) -> int | float:
    """`"8"` is a rank, `"0.9"` an energy threshold."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loqt_peft", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    export = commands.add_parser(
        "export",
        help="write an adapter in a form that loads without this package",
        description="Write a LoQT adapter as a dense model, a bitsandbytes 4-bit model or a LoRA adapter, each of which "
        "loads without this package. HF_TOKEN and HF_HOME are honoured as by transformers.",
    )
    export.add_argument("adapter", metavar="ADAPTER", help="folder or Hub name of the adapter")
    export.add_argument("output_dir", metavar="OUT_DIR", help="a new or empty folder")
    export.add_argument("--to", required=True, choices=FORMATS)
    export.add_argument(
        "--rank",
        type=parse_rank,
        help="with --to lora: an integer, or a number with a decimal point, up to 1.0: the share of each layer's squared "
        "change that its rank must keep",
    )
    export.add_argument("--base-model", help="folder or Hub name of the base model (default: what the adapter names)")
    export.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the exported weights that are not quantized (default: that of the base model, float32 for LoRA)",
    )
    export.add_argument("--revision", help="branch, tag or commit of the adapter")
    export.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    export.add_argument("--overwrite", action="store_true", help="replace a model that OUT_DIR holds")
    export.set_defaults(run=export_command)
    add_estimate_parser(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 2 after an error of the user's, which is printed in one line."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
