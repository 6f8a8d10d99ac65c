"""Whether several processes begin from one adapter: DDP makes B equal, and leaves alone what an update keeps equal."""

from __future__ import annotations

import json
import zlib

import torch
import torch.distributed as dist
from torch import nn

from ..layers.layer import LoQTLayer
from ..saving.seal import checksum


# of a config, what may be another one on another machine
_PLACES = ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode")
_LAST_STEP = "_loqt_last_step"


def require_agreement(model: nn.Module, layers: list[tuple[str, LoQTLayer]], adapter_name: str, step: int) -> None:
    """When training begins, or goes on from another step: compare the adapters of all processes.

    All processes must call this, at every step. Nothing is compared at a step that follows the last one.

    Args:
        model (`nn.Module`): Remembers the last step.
        layers: The LoQT layers that train, with their names.
        adapter_name (`str`): The adapter that trains.
        step (`int`): Number of optimizer steps already taken.

    Raises:
        ValueError: On all processes, if step, config, layers, W or P are not those of process 0; it says where.
    """
    last = vars(model).get(_LAST_STEP)
    vars(model)[_LAST_STEP] = step
    if last is not None and step in (last, last + 1):
        return
    device = layers[0][1].compute_device
    config = {key: value for key, value in layers[0][1].config[adapter_name].to_dict().items() if key not in _PLACES}
    setup = json.dumps([config, [name for name, _ in layers]], sort_keys=True, default=_plain)
    by_layer = [_state_of(layer, adapter_name) for _, layer in layers]
    state = zlib.crc32(torch.tensor(by_layer, dtype=torch.int64, device="cpu").numpy().tobytes())
    steps, setups, states = _by_process([step, zlib.crc32(setup.encode()), state], device)
    if len(set(steps)) > 1:
        raise ValueError(
            f"The processes go on from different steps: {steps}, by rank. Resume all of them from the same checkpoint."
        )
    if len(set(setups)) > 1:
        raise ValueError(
            f"The LoQT adapter {adapter_name!r} has another config or other layers on {_others(setups)} than on process 0. "
            "Give all processes the same `LoQTConfig` and base model."
        )
    if len(set(states)) > 1:
        rows = _by_process(by_layer, device)
        different = [name for (name, _), row in zip(layers, rows, strict=True) if len(set(row)) > 1]
        raise ValueError(
            f"{len(different)} of {len(layers)} layers of the LoQT adapter {adapter_name!r}, e.g. {different[0]}, have "
            f"another W or P on {_others(states)} than on process 0. Load the same adapter or checkpoint in all processes."
        )


def _plain(value: object) -> object:
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def _state_of(layer: LoQTLayer, adapter_name: str) -> int:
    if layer.base.is_sharded:
        # the processes have parts of one model, which were compared before it was divided
        return layer.num_updates(adapter_name)
    found = 0
    for buffers in (layer.loqt_P, layer.loqt_weight, layer.loqt_error, layer.loqt_state):
        if adapter_name in buffers:
            found = checksum(buffers[adapter_name], found + 1)
    return found


def _by_process(numbers: list[int], device: torch.device) -> list[list[int]]:
    """Of each number what the processes have of it, by rank."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return torch.stack(gathered, dim=1).tolist()


def _others(values: list[int]) -> str:
    ranks = [rank for rank, value in enumerate(values) if value != values[0]]
    shown = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"{'process' if len(ranks) == 1 else 'processes'} {shown}"
