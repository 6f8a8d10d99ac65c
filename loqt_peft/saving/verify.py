"""Whether a saved adapter is whole, undamaged and meant for this model: its seals against what was read."""

from __future__ import annotations

import torch
from torch import nn

from .seal import (
    DTYPES,
    ERROR,
    FEEDBACK,
    FORMAT_VERSION,
    TENSORS,
    Seal,
    canonical,
    named_checksum,
    names_checksum,
    newer_version,
    part_checksum,
    quantization_code,
    quantization_name,
    rest_checksums,
    same_base,
)


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
    saved, saved_rest = _by_layer(state_dict)
    here = {canonical(name): layer for name, layer in layers.items()}
    _verify_names(saved, here, problems)
    _verify_rest(saved_rest, rest, problems)
    seals: dict[str, Seal] = {}
    for name in sorted(saved.keys() & here.keys()):
        _verify_layer(name, here[name], adapter_name, saved[name], seals, problems)

    other_base = [name for name, seal in seals.items() if not same_base(seal, *here[name].base_sample())]
    if not problems.found:
        _verify_whole(seals, here, saved_rest, problems)
    switched = all("loqt_weight" in saved[name] for name in seals)
    warning = None
    if other_base and (base_is_needed or not switched):
        for name in other_base:
            problems.add("The adapter was made for other base weights than this model's", name)
    elif other_base:
        warning = (
            "This LoQT adapter was made on other base weights. It holds every weight of the model, so the model is as it "
            "was saved; but the change of the base (`get_delta_weight`, conversion to LoRA) now refers to this base."
        )
    problems.raise_any()
    return warning


def _by_layer(
    state_dict: dict[str, torch.Tensor],
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The tensors of each LoQT layer by their parts, and those outside of LoQT layers by their keys."""
    saved: dict[str, dict[str, torch.Tensor]] = {}
    saved_rest: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        name, _, part = canonical(key).rpartition(".")
        if part in (*TENSORS, ERROR, "loqt_seal"):
            saved.setdefault(name, {})[part] = tensor
        else:
            saved_rest[canonical(key)] = tensor
    return saved, saved_rest


def _verify_names(saved, here, problems) -> None:
    for name in sorted(saved.keys() - here.keys()):
        problems.add("The adapter targets layers that this model's config does not target", name)
    for name in sorted(here.keys() - saved.keys()):
        problems.add("This model's config targets layers that are not in the adapter", name)


def _verify_rest(saved_rest, rest, problems) -> None:
    for key in sorted(rest.keys() - saved_rest.keys()):
        problems.add("Missing in the adapter", key)
    for key in sorted(saved_rest.keys() - rest.keys()):
        problems.add("The adapter holds tensors that this model's config has no place for", key)
    for key in sorted(saved_rest.keys() & rest.keys()):
        if saved_rest[key].shape != rest[key].shape:
            problems.add(
                "Another shape", f"{key} {tuple(saved_rest[key].shape)}, in this model {tuple(rest[key].shape)}"
            )


def _verify_whole(seals, here, saved_rest, problems) -> None:
    """That nothing of the adapter was lost before it came here: a loader of its own drops what it has no place for."""
    if any(seal.layers != names_checksum(here) for seal in seals.values()):
        problems.add("This model's config does not target", "all layers of the adapter")
    names, dtypes, content = rest_checksums(saved_rest)
    if any(seal.rest_names != names for seal in seals.values()):
        problems.add("This model's config has no place for", "all tensors of the adapter outside LoQT layers")
    elif any(seal.rest_dtypes == dtypes and seal.rest != content for seal in seals.values()):
        problems.add("The tensors do not match the checksum of", "the modules outside LoQT layers")


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
        expected = quantization_code(getattr(config, field_name), config.double_quant, feedback)
        if code != expected:
            problems.add(
                f"Another storage format, {field_name}={quantization_name(code)} in the adapter and "
                f"{quantization_name(expected)} in this model",
                name,
            )
    if seal.scaling != layer.scaling[adapter_name]:
        problems.add(
            f"Another scale, {seal.scaling:g} in the adapter and {layer.scaling[adapter_name]:g} in this model", name
        )

    if bool(seal.checksums[2]) != ("loqt_weight" in tensors):
        problems.add("Missing in the adapter" if seal.checksums[2] else "Superfluous", f"{name}.loqt_weight")
    if (ERROR in tensors) != bool("loqt_weight" in tensors and seal.weight_format & FEEDBACK):
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
        elif dtype >= len(DTYPES) or tensor.dtype != DTYPES[dtype]:
            # a loader that casts to what the model holds: exact if that is wider, and the cast back finds the same bits
            wider = dtype < len(DTYPES) and tensor.is_floating_point() and DTYPES[dtype] is not None
            if not wider or torch.promote_types(tensor.dtype, DTYPES[dtype]) != tensor.dtype:
                problems.add(f"Saved in another dtype than {tensor.dtype}", f"{name}.{part}")
            elif named_checksum(f"{name}.{part}", tensor.to(DTYPES[dtype])) != crc:
                problems.add("The tensors do not match their checksums", f"{name}.{part}")
        elif part_checksum(name, part, tensors) != crc:
            problems.add("The tensors do not match their checksums", f"{name}.{part}")
