"""PEFT's LoftQ initialisation without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft.tuners.lora import layer as lora_layer
from peft.utils.loftq_utils import _low_rank_decomposition


@torch.no_grad()
def loftq_init(weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1):
    """The steps of `peft.utils.loftq_utils.loftq_init` (0.21), which moves every weight to `"cuda"`, where the weight is.

    Returns:
        The weight rounded to NF4, A `[r, in]` and B `[out, r]`.
    """
    original = weight.float()
    residual = original
    for _ in range(num_iter):
        # as one row: bitsandbytes (0.50.2) takes the wrong absmax on some processors where rows are not whole blocks
        row = dequantize_4bit(*quantize_4bit(residual.reshape(1, -1), blocksize=64, quant_type="nf4"))
        quantized = row.view(weight.shape)
        factors = _low_rank_decomposition(original - quantized, reduced_rank=reduced_rank)
        residual = original - factors["L"] @ factors["R"]
    return quantized.to(weight.dtype), factors["R"], factors["L"]


@contextmanager
def loftq_where_the_weights_are() -> Iterator[None]:
    """Let PEFT initialise on the CPU, if there is nothing else."""
    if torch.cuda.is_available() or torch.xpu.is_available():
        yield
        return
    with mock.patch.object(lora_layer, "loftq_init", loftq_init):
        yield
