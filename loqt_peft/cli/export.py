"""`loqt export`: an adapter in a form that loads without this package."""

from __future__ import annotations

import argparse
import contextlib
import ctypes

from ..choices import DTYPES, EXPORT_FORMATS


# of glibc's malloc.h
_M_MMAP_THRESHOLD = -3


def add_export_parser(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "export",
        help="write an adapter in a form that loads without this package",
        description="Write a LoQT adapter as a dense model, a bitsandbytes 4-bit model, the same with a LoRA adapter beside "
        "it (qlora: in 4 bits, and nothing is lost) or a LoRA adapter alone. Each loads without this package. HF_TOKEN and "
        "HF_HOME are honoured as by transformers.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub name of the adapter")
    parser.add_argument("output_dir", metavar="OUT_DIR", help="a new or empty folder")
    parser.add_argument("--to", required=True, choices=EXPORT_FORMATS)
    parser.add_argument(
        "--rank",
        type=parse_rank,
        help="with --to lora: an integer, or a number with a decimal point, up to 1.0: the share of each layer's squared "
        "change that its rank must keep",
    )
    parser.add_argument(
        "--base-name",
        help="with --to qlora: what the LoRA adapter names as its base model (default: the folder OUT_DIR/base), as the Hub "
        "name under which you push that folder",
    )
    parser.add_argument("--base-model", help="folder or Hub name of the base model (default: what the adapter names)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the exported weights that are not quantized (default: that of the base model, float32 for LoRA)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the adapter")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that OUT_DIR holds")
    parser.set_defaults(run=export_command)


def parse_rank(text: str) -> int | float:
    """`"8"` is a rank, `"0.9"` an energy threshold."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def return_freed_memory() -> None:
    """Have glibc hand freed tensors back to the system, in this whole process; nothing with another C library."""
    # it stops doing so by itself after the first large ones, and an export to 4 bits then peaks at nearly twice the model
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def export_command(options: argparse.Namespace) -> None:
    """Export a saved adapter, and print what that lost."""
    import torch
    from peft import PeftModel

    from ..export import check_base_name, check_output_dir, check_rank
    from .adapter import base_name, copy_tokenizer, load_base, load_config, trained_quantization

    check_rank(options.to, options.rank)
    check_base_name(options.to, options.base_name)
    return_freed_memory()
    config = load_config(options.adapter, options.revision)
    base = options.base_model or base_name(config, options.adapter)
    output_dir = check_output_dir(options.output_dir, options.overwrite, (options.adapter, base))

    quantization_config = trained_quantization(options.adapter, options.revision)
    model = load_base(config, base, options.dtype, options.device, quantization_config)
    model = PeftModel.from_pretrained(model, options.adapter, revision=options.revision)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    report = model.export(
        output_dir,
        options.to,
        rank=options.rank,
        dtype=dtype,
        overwrite=options.overwrite,
        progressbar=True,
        base_name=options.base_name,
    )
    print(report)
    if options.to == "bnb-4bit" and report.weight_error:
        print("what was lost, --to qlora keeps: the same 4 bits, and a LoRA adapter beside them")
    tokenizer = copy_tokenizer(output_dir, options.adapter, base, revision=options.revision)
    print("no tokenizer found" if tokenizer is None else f"tokenizer: {tokenizer}")
