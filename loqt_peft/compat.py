"""What leans on private parts of PEFT, torch, transformers and bitsandbytes, each with the versions in which it was read.

Whoever needs another such part puts it here; tests/test_compat.py fails when one of them changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import bitsandbytes as bnb
import torch

# PEFT 0.21: buffers by adapter, which a state dict holds and PEFT's `other_param_names` find
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import PeftType
from torch import nn


# torch 2.13 and 2.14 shard parameters of integers; 2.11 wants to differentiate by them, 2.6 takes one dtype in a block
SHARDS_INTEGERS = torch.__version__ >= (2, 13)

__all__ = [
    "SHARDS_INTEGERS",
    "BufferDict",
    "add_peft_type",
    "calling_objects",
    "group_timeout",
    "include_all_linear_layers",
    "is_in_backward",
    "kept_in_float32",
    "quantize_now",
    "storage_key",
    "swap_hooks",
    "unpack_from_cpu",
]

# torch 2.6 to 2.13: the hooks of a module, by kind
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def add_peft_type(name: str) -> None:
    """Give PEFT's enum of methods one more member; an own one of that name is left as it is (PEFT 0.21, Python 3.10 to 3.13).

    PEFT has no public way to do so. Only what every version's enum has is touched.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def include_all_linear_layers(config: Any, model: nn.Module) -> Any:
    """The config with `target_modules="all-linear"` written out, as PEFT does for every tuner (PEFT 0.21)."""
    return _maybe_include_all_linear_layers(config, model)


def calling_objects(kind: type) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """The objects of a class of which a method is running, from the innermost: object, name of the method, its variables.

    transformers hands callbacks no reference to the Trainer or its handler (5.0 to 5.23), and PEFT hands a config none to the
    push that is under way (0.21).
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):
            yield caller, frame.f_code.co_name, frame.f_locals
        frame = frame.f_back


def is_in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread (torch 2.6 to 2.13)."""
    return torch._C._current_graph_task_id() != -1


def group_timeout(group: Any, device: torch.device) -> timedelta:
    """How long a process group waits for the others on a type of device (torch 2.6 to 2.13)."""
    return group._get_backend(device).options._timeout


def swap_hooks(one: nn.Module, other: nn.Module) -> None:
    """Exchange all hooks on forward and backward passes; their handles go on working (torch 2.6 to 2.13)."""
    for name in _HOOKS:
        # the very dicts, which the handles refer to
        one.__dict__[name], other.__dict__[name] = other.__dict__[name], one.__dict__[name]


def storage_key(tensor: torch.Tensor) -> int:
    """The same number for tensors that share a storage, meta tensors too, as long as it lives (torch 2.6 to 2.13)."""
    return tensor.untyped_storage()._cdata


def kept_in_float32(model: nn.Module) -> list[str]:
    """Names of the modules that transformers keeps in float32, whatever a checkpoint says (5.0 to 5.23)."""
    return list(model._keep_in_fp32_modules or ())


def unpack_from_cpu(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """A 4-bit weight and its state in the common layout, from that for AVX512-BF16 (bitsandbytes 0.50)."""
    return bnb.functional._convert_weight_packed_for_cpu_inverse(weight, state)


def quantize_now(weight: bnb.nn.Params4bit, device: torch.device) -> bnb.nn.Params4bit:
    """Quantize a 4-bit parameter on `device`, the meta device too, where `.to(device)` does not (bitsandbytes 0.50)."""
    return weight._quantize(device)
