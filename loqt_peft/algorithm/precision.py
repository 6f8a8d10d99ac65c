"""Settings of all of torch that must not change the numbers of an adapter: default dtype and device, autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch


_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """float32 and the CPU, for tensors that others make without saying of what dtype and where."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def without_autocast(function: Callable) -> Callable:
    """A function whose matrix products are computed in the dtypes of their factors, wherever it is called."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            for device_type in filter(torch.is_autocast_enabled, _AUTOCAST_DEVICES):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(*args, **kwargs)

    return wrapper
