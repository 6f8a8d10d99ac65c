"""What `DistributedDataParallel` has to leave alone in a model with LoQT layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peft import PeftModel
from torch import nn

from .update import loqt_layers


# the update keeps them equal on all processes; DDP would broadcast every buffer at every forward pass
_BUFFERS = ("loqt_P", "loqt_weight", "loqt_error", "loqt_state", "loqt_seal")


def ignored_by_ddp(module: nn.Module) -> list[str]:
    """The names of the tensors in a module that DDP must neither broadcast nor ask for their device.

    Beside the buffers of the adapters these are base weights that lie on another device than the layer's computation
    (`retain_base="cpu"`), since DDP takes parameters of one type of device only.

    A `PeftModel` tells DDP by itself. With the Trainer [`LoQTTrainerCallback`] does so for any other module. In a loop of
    your own, where the `PeftModel` is part of another module or the adapter was added by transformers' `add_adapter`:

    ```py
    names = ignored_by_ddp(module)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    module = DistributedDataParallel(module)
    ```

    Args:
        module (`nn.Module`): What DDP will wrap.
    """
    names = []
    for name, layer in loqt_layers(module):
        names += [f"{name}.{buffer}.{adapter}" for buffer in _BUFFERS for adapter in getattr(layer, buffer)]
        if layer.base_is_offloaded:
            names.append(f"{name}.base_layer.weight")
    return names


class _Ignored:
    """Names as they are when DDP asks: from a checkpoint may come a base weight that moves to the host."""

    def __init__(self, module: nn.Module, others: Iterable[str]) -> None:
        self.module, self.others = module, others

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        yield from ignored_by_ddp(self.module)


def tell_ddp(module: nn.Module) -> None:
    """Let a DDP that will wrap `module` leave alone what [`ignored_by_ddp`] lists by then."""
    known = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    # a PeftModel finds the attribute in its tuner
    if not isinstance(known, _Ignored) and not isinstance(module, PeftModel):
        module._ddp_params_and_buffers_to_ignore = _Ignored(module, known)
