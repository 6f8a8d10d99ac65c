"""What a saved adapter must hold, the seals that prove it unchanged, and which checkpoint of a run is complete.

A LoQT adapter replaces the weights of the base, so a tensor that is lost, damaged or meant for another model would give a
model that is silently wrong. PEFT loads with `strict=False`. Therefore every layer of a saved adapter carries a seal, one
int64 tensor `loqt_seal`: checksums of its tensors, what their bytes mean, and a sample of the base weight under it. It is
written when an adapter is saved and verified before anything is loaded; in a live model it is all zeros.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

# Raise it when files of the new version mean something else to the old code, and go on reading those of the old one.
FORMAT_VERSION = 1

SAMPLE_SIZE = 64
# a step that is coprime to all usual widths, so that the sample is not one column
_SAMPLE_STEP = 2654435761

# positions in these tuples are stored in files: append only
_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64)
_QUANT_TYPES = (None, "nf4", "fp4")
_DOUBLE = 16
_FEEDBACK = 32
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
    base_sample: torch.Tensor = field(default_factory=lambda: torch.full((SAMPLE_SIZE,), torch.nan))

    def to_tensor(self) -> torch.Tensor:
        """int64 `[SEAL_SIZE]`; the last element is the checksum of the others."""
        *integers, scaling, base_storage, sample = astuple(self)
        numbers = [n for value in integers for n in (value if isinstance(value, tuple) else (value,))]
        numbers = torch.tensor([*numbers, base_storage], dtype=torch.int64)
        scaling = torch.tensor([scaling], dtype=torch.float64).view(torch.int64)
        content = torch.cat([numbers, scaling, sample.contiguous().view(torch.int64)])
        return torch.cat([content, torch.tensor([checksum(content)])])

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
    """CRC-32 of a tensor's bytes, whatever its device; its shape and dtype do not enter."""
    return zlib.crc32(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy(), start)


def _named_checksum(name: str, tensor: torch.Tensor, start: int = 0) -> int:
    # the name enters, or two layers could trade places
    return checksum(tensor, zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), start))


def _part_checksum(name: str, part: str, tensors: dict[str, torch.Tensor]) -> int:
    """Of a part of a layer; 0 if there is none."""
    if part not in tensors:
        return 0
    start = 0
    if part == "loqt_weight" and ERROR in tensors:
        start = _named_checksum(f"{name}.{ERROR}", tensors[ERROR])
    return _named_checksum(f"{name}.{part}", tensors[part], start)


def _dtype_code(dtype: torch.dtype) -> int:
    return _DTYPES.index(dtype)


def _quantization_code(quant_type: str | None, double_quant: bool, error_feedback: bool = False) -> int:
    if quant_type is None:
        return 0
    return _QUANT_TYPES.index(quant_type) + _DOUBLE * double_quant + _FEEDBACK * error_feedback


def _quantization_name(code: int) -> str:
    name = _QUANT_TYPES[code % _DOUBLE] if code % _DOUBLE < len(_QUANT_TYPES) else f"unknown ({code})"
    flags = {_DOUBLE: "double_quant", _FEEDBACK: "error_feedback"}
    given = [flag for bit, flag in flags.items() if code & bit]
    return repr(name) + (f" with {' and '.join(given)}" if given else "")


def base_storage_code(weight: torch.Tensor) -> int:
    """How a base weight is stored: the dtype of a dense one, the quantization of one in 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return _dtype_code(weight.dtype)
    return _FOUR_BIT_BASE + _quantization_code(state.quant_type, state.nested)


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
    return str(_QUANT_TYPES[code % _DOUBLE]), code - _FOUR_BIT_BASE >= _DOUBLE


def sample(weight: torch.Tensor) -> torch.Tensor:
    """64 elements of a matrix, float32 on the CPU."""
    indices = torch.arange(SAMPLE_SIZE, device=weight.device) * _SAMPLE_STEP % weight.numel()
    return weight.reshape(-1)[indices].float().cpu()


def _same_base(saved: Seal, storage: int, here: torch.Tensor) -> bool:
    there = saved.base_sample
    if there.isnan().any() or here.isnan().any():
        return True
    if saved.base_storage == storage:
        return torch.equal(there, here)
    # the same weights in another precision: 4-bit blocks are off by about a tenth, another model by more than its norm
    tolerance = 0.4 if max(saved.base_storage, storage) >= _FOUR_BIT_BASE else 2**-6
    return bool(torch.linalg.vector_norm(there - here) <= tolerance * torch.linalg.vector_norm(there))


###############################
# Seal and verify
###############################


def canonical(name: str) -> str:
    """A name without the prefix of PeftModel.

    transformers' own integration does without it, and each loads what the other saved.
    """
    return name.removeprefix("base_model.model.")


def _names_checksum(names: Iterable[str]) -> int:
    return zlib.crc32("\n".join(sorted(names)).encode())


def _rest_checksums(tensors: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """Checksums of names, dtypes and contents."""
    content = 0
    for key in sorted(tensors):
        content = _named_checksum(key, tensors[key], content)
    return _names_checksum(tensors), _names_checksum(f"{k} {v.dtype}" for k, v in tensors.items()), content


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
    rest_names, rest_dtypes, rest_content = _rest_checksums(rest)
    layer_names = _names_checksum(map(canonical, layers))
    seals = {}
    for name, layer in layers.items():
        keys = {part: f"{name}.{part}.{adapter_name}" for part in (*TENSORS, ERROR)}
        own = {part: tensors[key] for part, key in keys.items() if key in tensors}
        config = layer.config[adapter_name]
        storage, base_sample = layer.base_sample()
        seals[f"{name}.loqt_seal.{adapter_name}"] = Seal(
            checksums=tuple(_part_checksum(canonical(name), part, own) for part in TENSORS),
            dtypes=tuple(_dtype_code(own[part].dtype) if part in own else 0 for part in TENSORS),
            layers=layer_names,
            rest_names=rest_names,
            rest_dtypes=rest_dtypes,
            rest=rest_content,
            weight_format=_quantization_code(config.quantize_weight, config.double_quant, config.error_feedback),
            projection_format=_quantization_code(config.quantize_projection, config.double_quant),
            scaling=float(layer.scaling[adapter_name]),
            base_storage=storage,
            base_sample=base_sample,
        ).to_tensor()
    return seals


class _Problems:
    """All that is wrong with an adapter, said in one error."""

    def __init__(self, adapter_name: str):
        self.adapter_name = adapter_name
        self.found: dict[str, list[str]] = {}

    def add(self, what: str, where: str) -> None:
        self.found.setdefault(what, []).append(where)

    def raise_any(self) -> None:
        if not self.found:
            return
        lines = []
        for what, where in self.found.items():
            shown = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
            lines.append(f"{what}: {shown}")
        raise ValueError(
            f"The LoQT adapter for {self.adapter_name!r} cannot be loaded, and nothing was changed.\n- "
            + "\n- ".join(lines)
        )


def verify_adapter(
    layers: dict[str, nn.Module],
    rest: dict[str, torch.Tensor],
    adapter_name: str,
    state_dict: dict[str, torch.Tensor],
    base_is_needed: bool,
) -> str | None:
    """Check that a saved adapter is whole, undamaged and meant for this model.

    Args:
        layers (`dict[str, LoQTLayer]`): The adapter's layers in the model by their names.
        rest (`dict[str, torch.Tensor]`):
            The model's own tensors for what the adapter holds outside LoQT layers, by their keys in the checkpoint.
        adapter_name (`str`): Its name.
        state_dict (`dict[str, torch.Tensor]`): The checkpoint: keys without the adapter's name.
        base_is_needed (`bool`): Whether the loaded model's output depends on base weights beside those of the layers.

    Returns:
        `str` or `None`: What is to be warned of, although nothing is wrong with the result.

    Raises:
        ValueError:
            If tensors are missing, superfluous, damaged, of another rank, other targets, another storage format or another
            scale, if the adapter is of a newer version, or made for another base. It says which and where.
    """
    problems = _Problems(adapter_name)
    saved: dict[str, dict[str, torch.Tensor]] = {}
    saved_rest: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        name, _, part = canonical(key).rpartition(".")
        if part in (*TENSORS, ERROR, "loqt_seal"):
            saved.setdefault(name, {})[part] = tensor
        else:
            saved_rest[canonical(key)] = tensor

    here = {canonical(name): layer for name, layer in layers.items()}
    for name in sorted(saved.keys() - here.keys()):
        problems.add("The adapter targets layers that this model's config does not target", name)
    for name in sorted(here.keys() - saved.keys()):
        problems.add("This model's config targets layers that are not in the adapter", name)
    for key in sorted(rest.keys() - saved_rest.keys()):
        problems.add("Missing in the adapter", key)
    for key in sorted(saved_rest.keys() - rest.keys()):
        problems.add("The adapter holds tensors that this model's config has no place for", key)
    for key in sorted(saved_rest.keys() & rest.keys()):
        if saved_rest[key].shape != rest[key].shape:
            problems.add(
                "Another shape", f"{key} {tuple(saved_rest[key].shape)}, in this model {tuple(rest[key].shape)}"
            )

    seals: dict[str, Seal] = {}
    for name in sorted(saved.keys() & here.keys()):
        _verify_layer(name, here[name], adapter_name, saved[name], seals, problems)

    other_base = [name for name, seal in seals.items() if not _same_base(seal, *here[name].base_sample())]
    if not problems.found:
        # a loader of its own drops what it has no place for
        if any(seal.layers != _names_checksum(here) for seal in seals.values()):
            problems.add("This model's config does not target", "all layers of the adapter")
        names, dtypes, content = _rest_checksums(saved_rest)
        if any(seal.rest_names != names for seal in seals.values()):
            problems.add("This model's config has no place for", "all tensors of the adapter outside LoQT layers")
        elif any(seal.rest_dtypes == dtypes and seal.rest != content for seal in seals.values()):
            problems.add("The tensors do not match the checksum of", "the modules outside LoQT layers")
    drifted = all("loqt_weight" in saved[name] for name in seals)
    warning = None
    if other_base and (base_is_needed or not drifted):
        for name in other_base:
            problems.add("The adapter was made for other base weights than this model's", name)
    elif other_base:
        warning = (
            "This LoQT adapter was made on other base weights. It holds every weight of the model, so the model is as it "
            "was saved; but the change of the base (`get_delta_weight`, conversion to LoRA) now refers to this base."
        )
    problems.raise_any()
    return warning


def _rank(B: torch.Tensor, layer: nn.Module) -> int | None:
    """Rank that a B of this layer has; `None` if it is no B of this layer."""
    own = layer.out_features if layer.right else layer.in_features
    if B.dim() != 2 or B.shape[0 if layer.right else 1] != own:
        return None
    return B.shape[1 if layer.right else 0]


def _verify_layer(name, layer, adapter_name, tensors, seals, problems) -> None:
    for part in ("loqt_B", "loqt_P", "loqt_state", "loqt_seal"):
        if part not in tensors:
            problems.add("Missing in the adapter", f"{name}.{part}")
    if "loqt_seal" not in tensors:
        return
    try:
        seal = Seal.from_tensor(tensors["loqt_seal"])
    except ValueError as error:
        problems.add(f"It cannot be read, {error}", name)
        return
    if seal.format_version > FORMAT_VERSION:
        problems.add(f"It cannot be read, {newer_version(seal.format_version)}", name)
        return
    seals[name] = seal

    config = layer.config[adapter_name]
    for field_name, code, feedback in (
        ("quantize_weight", seal.weight_format, config.error_feedback),
        ("quantize_projection", seal.projection_format, False),
    ):
        expected = _quantization_code(getattr(config, field_name), config.double_quant, feedback)
        if code != expected:
            problems.add(
                f"Another storage format, {field_name}={_quantization_name(code)} in the adapter and "
                f"{_quantization_name(expected)} in this model",
                name,
            )
    if seal.scaling != layer.scaling[adapter_name]:
        problems.add(
            f"Another scale, {seal.scaling:g} in the adapter and {layer.scaling[adapter_name]:g} in this model", name
        )

    if bool(seal.checksums[2]) != ("loqt_weight" in tensors):
        problems.add("Missing in the adapter" if seal.checksums[2] else "Superfluous", f"{name}.loqt_weight")
    if (ERROR in tensors) != bool("loqt_weight" in tensors and seal.weight_format & _FEEDBACK):
        problems.add("Superfluous" if ERROR in tensors else "Missing in the adapter", f"{name}.{ERROR}")
        return
    shapes, rank = layer.tensor_shapes(adapter_name), layer.r[adapter_name]
    saved_rank = _rank(tensors["loqt_B"], layer) if "loqt_B" in tensors else rank
    if saved_rank not in (rank, None):
        problems.add(f"Another rank, {saved_rank} in the adapter and {rank} in this model", name)
        return
    for part, crc, dtype in zip(TENSORS, seal.checksums, seal.dtypes, strict=True):
        if part not in tensors:
            continue
        tensor = tensors[part]
        if tensor.shape != shapes[part]:
            problems.add("Another shape", f"{name}.{part} {tuple(tensor.shape)}, in this model {tuple(shapes[part])}")
        elif dtype >= len(_DTYPES) or tensor.dtype != _DTYPES[dtype]:
            # a loader that casts to what the model holds: exact if that is wider, and the cast back finds the same bits
            wider = dtype < len(_DTYPES) and tensor.is_floating_point() and _DTYPES[dtype] is not None
            if not wider or torch.promote_types(tensor.dtype, _DTYPES[dtype]) != tensor.dtype:
                problems.add(f"Saved in another dtype than {tensor.dtype}", f"{name}.{part}")
            elif _named_checksum(f"{name}.{part}", tensor.to(_DTYPES[dtype])) != crc:
                problems.add("The tensors do not match their checksums", f"{name}.{part}")
        elif _part_checksum(name, part, tensors) != crc:
            problems.add("The tensors do not match their checksums", f"{name}.{part}")


###############################
# Checkpoints of a run
###############################


def get_last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest *complete* checkpoint in the output directory of a Trainer, for `train(resume_from_checkpoint=...)`.

    Where a process was killed while it saved, the newest directory is incomplete, and `resume_from_checkpoint=True` would
    take it. Here it is passed over, with a log message; nothing is deleted.

    Args:
        folder (`str` or `os.PathLike`): `TrainingArguments.output_dir`.

    Returns:
        `str` or `None`: Path of the checkpoint, if there is one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    found = []
    for path in folder.iterdir():
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    for _, path in sorted(found, reverse=True):
        reason = _incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("%s is not complete and is passed over: %s.", path, reason)
    return None


def _incomplete(checkpoint: Path) -> str | None:
    # the Trainer writes its state last
    state = checkpoint / TRAINER_STATE_NAME
    if not state.is_file():
        return f"it has no {TRAINER_STATE_NAME}"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                # torch writes zip files, whose table of contents is at the end; nothing is unpickled here
                with zipfile.ZipFile(path):
                    pass
        except (ValueError, SafetensorError, zipfile.BadZipFile, OSError) as error:
            return f"{path.name}: {error}"
    return None
