"""A tensor that may be sharded over processes (a `DTensor`): the whole of it, this process's part, and writing into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist


if TYPE_CHECKING or dist.is_available():
    from torch.distributed.tensor import DTensor


def is_sharded_tensor(tensor: torch.Tensor) -> bool:
    """Whether processes hold parts of it."""
    return dist.is_available() and isinstance(tensor, DTensor)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, dequantized if its parts are quantized; any other tensor as it is.

    All processes that hold a part must ask for it at the same time.
    """
    if not is_sharded_tensor(tensor):
        return tensor
    part, mesh = tensor.detach().to_local(), tensor.device_mesh
    if type(part) is not torch.Tensor:
        # of torchao: parts of unlike lengths may be stored in unlike ways
        part = part.dequantize()
    # with CPU offload the parts lie elsewhere than the processes meet
    part = DTensor.from_local(
        part.to(mesh.device_type),
        mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return part.full_tensor()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded_tensor(tensor) else tensor


def own_part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process holds of a whole tensor if it is sharded as `like` is; a view."""
    if not is_sharded_tensor(like):
        return value
    for dim, placement in enumerate(like.placements):
        if placement.is_shard():
            parts = value.chunk(like.device_mesh.size(dim), placement.dim)
            index = like.device_mesh.get_local_rank(dim)
            # the last processes may have nothing
            value = parts[index] if index < len(parts) else value.narrow(placement.dim, 0, 0)
    return value


@torch.no_grad()
def write(target: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole tensor, which every process has, into one that may be sharded."""
    local(target).copy_(own_part(value, target))
