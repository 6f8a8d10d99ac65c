"""The seal of a saved adapter: checksums of its tensors, what their bytes mean, and a sample of the base under it.

A LoQT adapter replaces the weights of the base, so a tensor that is lost, damaged or meant for another model would give a
model that is silently wrong. PEFT loads with `strict=False`. Therefore every layer of a saved adapter carries a seal, one
int64 tensor `loqt_seal`. It is written when an adapter is saved and verified before anything is loaded (`verify.py`); in a
live model it is all zeros.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field

import torch
from safetensors import safe_open
from torch import nn

from ..dtensor import full


# Raise it when files of the new version mean something else to the old code, and go on reading those of the old one.
FORMAT_VERSION = 1

SAMPLE_SIZE = 64
# a step that is coprime to all usual widths, so that the sample is not one column
_SAMPLE_STEP = 2654435761

# positions in these tuples are stored in files: append only
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64)
_QUANT_TYPES = (None, "nf4", "fp4")
_DOUBLE = 16
FEEDBACK = 32
_FOUR_BIT_BASE = 256

TENSORS = ("loqt_B", "loqt_P", "loqt_weight", "loqt_state")
# goes with the weight, into its checksum
ERROR = "loqt_error"


@dataclass
class Seal:
    """What a saved adapter says of one of its layers.

    Attributes:
        format_version (`int`): [`FORMAT_VERSION`] of the package that saved it.
        checksums (`tuple[int, int, int, int]`): CRC-32 of B, P, W with its error, and the update state; 0 without W.
        dtypes (`tuple[int, int, int, int]`): Their dtypes.
        layers (`int`): CRC-32 of the names of all LoQT layers.
        rest_names (`int`): CRC-32 of the names of the adapter's tensors outside LoQT layers.
        rest_dtypes (`int`): CRC-32 of their dtypes.
        rest (`int`): CRC-32 of their contents.
        weight_format (`int`): Quantization of W, and whether its error is kept.
        projection_format (`int`): Quantization of P.
        scaling (`float`): s.
        base_storage (`int`): dtype or quantization of the base weight.
        base_sample (`torch.Tensor`): float32 `[64]`, elements of the base weight; NaN if it was not at hand.
    """

    format_version: int = FORMAT_VERSION
    checksums: tuple[int, ...] = (0, 0, 0, 0)
    dtypes: tuple[int, ...] = (0, 0, 0, 0)
    layers: int = 0
    rest_names: int = 0
    rest_dtypes: int = 0
    rest: int = 0
    weight_format: int = 0
    projection_format: int = 0
    scaling: float = 0.0
    base_storage: int = 0
    base_sample: torch.Tensor = field(default_factory=lambda: no_sample())

    def to_tensor(self) -> torch.Tensor:
        """int64 `[SEAL_SIZE]`; the last element is the checksum of the others."""
        *integers, scaling, base_storage, sample = astuple(self)
        numbers = [n for value in integers for n in (value if isinstance(value, tuple) else (value,))]
        numbers = torch.tensor([*numbers, base_storage], dtype=torch.int64, device="cpu")
        scaling = torch.tensor([scaling], dtype=torch.float64, device="cpu").view(torch.int64)
        content = torch.cat([numbers, scaling, sample.contiguous().view(torch.int64)])
        return torch.cat([content, content.new_tensor([checksum(content)])])

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> Seal:
        """The inverse of `to_tensor`.

        Raises:
            ValueError: If the tensor is damaged or of a version that this package does not know.
        """
        tensor = tensor.cpu()
        if tensor.shape != (SEAL_SIZE,) or tensor.dtype != torch.int64 or int(tensor[-1]) != checksum(tensor[:-1]):
            # what comes first stays where it is in every version
            version = int(tensor.flatten()[0]) if tensor.dtype == torch.int64 and tensor.numel() else 0
            if FORMAT_VERSION < version < 1000:
                raise ValueError(newer_version(version))
            raise ValueError("its seal is damaged")
        numbers = tensor[: -2 - SAMPLE_SIZE // 2].tolist()
        return cls(
            format_version=numbers[0],
            checksums=tuple(numbers[1:5]),
            dtypes=tuple(numbers[5:9]),
            layers=numbers[9],
            rest_names=numbers[10],
            rest_dtypes=numbers[11],
            rest=numbers[12],
            weight_format=numbers[13],
            projection_format=numbers[14],
            base_storage=numbers[15],
            scaling=tensor[16:17].view(torch.float64).item(),
            base_sample=tensor[17:-1].view(torch.float32),
        )


SEAL_SIZE = 16 + 1 + SAMPLE_SIZE // 2 + 1


def newer_version(version: int) -> str:
    return (
        f"it was saved in format {version} and this version of loqt_peft reads up to format {FORMAT_VERSION}: "
        "upgrade loqt_peft"
    )


###############################
# Checksums and codes
###############################


def checksum(tensor: torch.Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, whatever its device; its shape and dtype do not enter.

    Of a sharded tensor all processes must ask.
    """
    return zlib.crc32(full(tensor.detach()).contiguous().cpu().flatten().view(torch.uint8).numpy(), start)


def named_checksum(name: str, tensor: torch.Tensor, start: int = 0) -> int:
    # the name enters, or two layers could trade places
    return checksum(tensor, zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), start))


def part_checksum(name: str, part: str, tensors: dict[str, torch.Tensor]) -> int:
    """Of a part of a layer; 0 if there is none."""
    if part not in tensors:
        return 0
    start = 0
    if part == "loqt_weight" and ERROR in tensors:
        start = named_checksum(f"{name}.{ERROR}", tensors[ERROR])
    return named_checksum(f"{name}.{part}", tensors[part], start)


def _dtype_code(dtype: torch.dtype) -> int:
    return DTYPES.index(dtype)


def quantization_code(quant_type: str | None, double_quant: bool, error_feedback: bool = False) -> int:
    if quant_type is None:
        return 0
    return _QUANT_TYPES.index(quant_type) + _DOUBLE * double_quant + FEEDBACK * error_feedback


def quantization_name(code: int) -> str:
    name = _QUANT_TYPES[code % _DOUBLE] if code % _DOUBLE < len(_QUANT_TYPES) else f"unknown ({code})"
    flags = {_DOUBLE: "double_quant", FEEDBACK: "error_feedback"}
    given = [flag for bit, flag in flags.items() if code & bit]
    return repr(name) + (f" with {' and '.join(given)}" if given else "")


def base_storage_code(weight: torch.Tensor) -> int:
    """How a base weight is stored: the dtype of a dense one, the quantization of one in 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return _dtype_code(weight.dtype)
    return _FOUR_BIT_BASE + quantization_code(state.quant_type, state.nested)


def saved_base_quantization(adapter_file: str | os.PathLike) -> tuple[str, bool] | None:
    """Quantization type and double quantization of the base that a saved adapter was trained on; `None` if it was dense.

    Args:
        adapter_file (`str` or `os.PathLike`): Path of `adapter_model.safetensors`.

    Raises:
        ValueError: If it is no LoQT adapter, or its seal cannot be read.
    """
    with safe_open(adapter_file, "pt") as file:
        keys = [key for key in file.keys() if key.endswith(".loqt_seal")]
        if not keys:
            raise ValueError(f"{str(adapter_file)!r} is not a LoQT adapter: it has no seals.")
        code = Seal.from_tensor(file.get_tensor(keys[0])).base_storage
    if code < _FOUR_BIT_BASE:
        return None
    return _QUANT_TYPES[code % _DOUBLE], code - _FOUR_BIT_BASE >= _DOUBLE


def no_sample() -> torch.Tensor:
    """In place of [`sample`], of a weight that is not at hand."""
    return torch.full((SAMPLE_SIZE,), torch.nan, dtype=torch.float32, device="cpu")


def sample(weight: torch.Tensor) -> torch.Tensor:
    """64 elements of a matrix, float32 on the CPU."""
    indices = torch.arange(SAMPLE_SIZE, device=weight.device) * _SAMPLE_STEP % weight.numel()
    return weight.reshape(-1)[indices].float().cpu()


def _absmax_tolerance(storage: int) -> float:
    """How far two samples of one base may lie apart, relative to each element.

    In eval, on processors with AVX512-BF16, bitsandbytes rounds the absmax of a base in 4 bits to bfloat16, for good, and
    quantizes it anew if it is double-quantized. Another code would move an element by more than a fifth.
    """
    if storage < _FOUR_BIT_BASE:
        return 0.0
    return 0.1 if storage - _FOUR_BIT_BASE >= _DOUBLE else 2**-8


def same_base(saved: Seal, storage: int, here: torch.Tensor) -> bool:
    there = saved.base_sample
    if there.isnan().any() or here.isnan().any():
        return True
    if saved.base_storage == storage:
        return torch.allclose(there, here, rtol=_absmax_tolerance(storage), atol=0)
    # the same weights in another precision: 4-bit blocks are off by about a tenth, another model by more than its norm
    tolerance = 0.4 if max(saved.base_storage, storage) >= _FOUR_BIT_BASE else 2**-6
    return bool(torch.linalg.vector_norm(there - here) <= tolerance * torch.linalg.vector_norm(there))


###############################
# Sealing
###############################


def canonical(name: str) -> str:
    """A name without the prefix of PeftModel.

    transformers' own integration does without it, and each loads what the other saved.
    """
    return name.removeprefix("base_model.model.")


def names_checksum(names: Iterable[str]) -> int:
    return zlib.crc32("\n".join(sorted(names)).encode())


def rest_checksums(tensors: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """Checksums of names, dtypes and contents."""
    content = 0
    for key in sorted(tensors):
        content = named_checksum(key, tensors[key], content)
    return names_checksum(tensors), names_checksum(f"{k} {v.dtype}" for k, v in tensors.items()), content


def seal_adapter(
    layers: dict[str, nn.Module],
    rest: dict[str, torch.Tensor],
    adapter_name: str,
    tensors: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The seals of an adapter that is about to be saved.

    Args:
        layers (`dict[str, LoQTLayer]`): The adapter's layers by their names.
        rest (`dict[str, torch.Tensor]`): Its tensors outside LoQT layers, by their keys in the checkpoint.
        adapter_name (`str`): Its name.
        tensors (`dict[str, torch.Tensor]`): What will be saved, by names in the model.

    Returns:
        `dict[str, torch.Tensor]`: Name of a layer's `loqt_seal` in the model -> int64 `[SEAL_SIZE]`.
    """
    rest_names, rest_dtypes, rest_content = rest_checksums(rest)
    layer_names = names_checksum(map(canonical, layers))
    seals = {}
    for name, layer in layers.items():
        keys = {part: f"{name}.{part}.{adapter_name}" for part in (*TENSORS, ERROR)}
        own = {part: tensors[key] for part, key in keys.items() if key in tensors}
        config = layer.config[adapter_name]
        storage, base_sample = layer.base_sample()
        seals[f"{name}.loqt_seal.{adapter_name}"] = Seal(
            checksums=tuple(part_checksum(canonical(name), part, own) for part in TENSORS),
            dtypes=tuple(_dtype_code(own[part].dtype) if part in own else 0 for part in TENSORS),
            layers=layer_names,
            rest_names=rest_names,
            rest_dtypes=rest_dtypes,
            rest=rest_content,
            weight_format=quantization_code(config.quantize_weight, config.double_quant, config.error_feedback),
            projection_format=quantization_code(config.quantize_projection, config.double_quant),
            scaling=float(layer.scaling[adapter_name]),
            base_storage=storage,
            base_sample=base_sample,
        ).to_tensor()
    return seals
