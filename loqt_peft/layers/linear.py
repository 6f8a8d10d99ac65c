"""The layer that takes the place of a linear one: its output, merging and unmerging."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..algorithm.linear_map import LoQTLinear
from ..compat import swap_hooks
from .base_weight import dense_layer
from .layer import LoQTLayer
from .sharded import mixed_precision_dtype
from .weight_guard import UnreadableWeight


if TYPE_CHECKING:
    from ..config import LoQTConfig


class Linear(LoQTLayer, nn.Module):
    """LoQT on `nn.Linear`, bitsandbytes' `Linear4bit` or GPT-2's `Conv1D`.

    `y = x deq(W_q)ᵀ + b + s · x (PB)ᵀ`; before an adapter's first switch the base layer takes the place of the first two
    terms (paper eq. 5).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        scaling: float | Literal["auto"],
        config: LoQTConfig,
        seed: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        LoQTLayer.__init__(self, base_layer, seed)
        # the base layer is called before the first switch only
        swap_hooks(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, scaling, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Batches that mix adapters (`adapter_names`) are not supported by LoQT.")
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base_forward(x)
        adapters = [name for name in self.active_adapters if name in self.loqt_B]
        if self.merged or not adapters:
            return self._base_forward(x)

        fuses = self._can_fuse(x, adapters)
        # another adapter's forward pass, as that of a reference model, is no part of the update
        records = self.training and self.capture.records and self.capture.adapter_name in adapters
        if records:
            self.capture.count_call()
        if fuses:
            # which records the gradient by itself
            y = self._fused_forward(x, adapters[0], records)
        else:
            y = self._unfused_forward(x, adapters)
            if records and torch.is_grad_enabled():
                y = self.capture.watch(y, x)
        if self.training and not records and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for adapter_name in adapters:
                self.watch.on_forward(self, adapter_name)
        return y.view(*x.shape[:-1], self.out_features) if fuses else y

    def _base_forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.merged:
            self.base.require("The base model's output")
        return self.base.forward(x)

    def _can_fuse(self, x: torch.Tensor, adapters: list[str]) -> bool:
        # torch.compile fuses by itself
        if len(adapters) > 1 or not self.uses_own_weight(adapters[0]) or torch.compiler.is_compiling():
            return False
        compute_dtype, output_dtype = self._weight_dtypes(x)
        return compute_dtype == output_dtype == self._low_rank_dtype(x, adapters[0])

    def _fused_forward(self, x: torch.Tensor, adapter_name: str, records: bool = False) -> torch.Tensor:
        """`[..., in]` to `[n, out]`; with `records` its backward pass adds dL/dW to the layer's sink."""
        dtype, bias = self._low_rank_dtype(x, adapter_name), self.get_base_layer().bias
        B = self.loqt_B[adapter_name]
        if not torch.is_grad_enabled():
            # an operation of one's own is told of what requires gradients, even where none are recorded
            x, B = x.detach(), B.detach()
        return LoQTLinear.apply(
            x,
            B.to(dtype),
            None if bias is None else bias.to(dtype),
            self.loqt_weight[adapter_name],
            self.loqt_P[adapter_name],
            self.weight_format(adapter_name),
            self.projection_format(adapter_name),
            self.scaling[adapter_name],
            self.right,
            self.capture.add if records and torch.is_grad_enabled() else None,
        )

    def _unfused_forward(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        y = self._weight_forward(x, adapters)
        dtype = y.dtype
        for adapter_name in adapters:
            y = y + self._low_rank_forward(x, adapter_name)
        return y.to(dtype)

    def _weight_forward(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        switched = [name for name in adapters if self.uses_own_weight(name)]
        y = self._base_forward(x) if len(switched) != 1 else None
        for adapter_name in switched:
            own = self._switched_forward(x, adapter_name)
            # every further adapter adds its own change to the base: deq(W_q) − W_base
            y = own if len(switched) == 1 else y + (own - self._base_forward(x))
        return y

    def _weight_dtypes(self, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
        """In which the product with W is computed, and returned."""
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            return dtype, dtype
        if (dtype := mixed_precision_dtype(self)) is not None:
            return dtype, dtype
        if self.quantization_backend is not None:
            return self.get_base_layer().compute_dtype or x.dtype, x.dtype
        return self.weight_dtype, self.weight_dtype

    def _low_rank_dtype(self, x: torch.Tensor, adapter_name: str) -> torch.dtype:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self._cast_input_dtype(x, self.loqt_B[adapter_name].dtype).dtype

    def _switched_forward(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        compute_dtype, output_dtype = self._weight_dtypes(x)
        bias = self.get_base_layer().bias
        if bias is not None:
            bias = bias.to(compute_dtype)
        weight_format = self.weight_format(adapter_name)
        y = weight_format.linear(x.to(compute_dtype), self.loqt_weight[adapter_name], bias)
        return y.to(output_dtype)

    def _low_rank_forward(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        B, P = self.loqt_B[adapter_name], self.loqt_P[adapter_name]
        scaling, projection_format = self.scaling[adapter_name], self.projection_format(adapter_name)
        x = x.to(self._low_rank_dtype(x, adapter_name))
        # s goes onto the smaller of the tensors, `[..., r]`
        if self.right:
            return F.linear(scaling * projection_format.linear(x, P), B)
        return projection_format.linear(scaling * F.linear(x, B), P)

    @property
    def weight(self) -> torch.Tensor:
        """The base weight; while an adapter acts, only to ask for its dtype, device and shape."""
        weight = self.get_base_layer().weight
        acts = any(name in self.loqt_B for name in self.active_adapters)
        readable = self.disable_adapters or self.merged or not acts or self.quantization_backend is not None
        if readable or torch.compiler.is_compiling():
            return weight
        return weight.detach().as_subclass(UnreadableWeight)

    def base_sample(self) -> tuple[int, torch.Tensor]:
        """See [`BaseWeight.sample`]."""
        return self.base.sample(self.compute_device)

    def effective_weight(self, adapter_name: str) -> torch.Tensor:
        """deq(W_q) + s·PB, or W_base + s·PB before the first switch: float32 `[out, in]`."""
        return self.low_rank_weight(adapter_name).add_(self.frozen_weight(adapter_name))

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """deq(W_q) − W_base + s·PB, float32, in the layout of the base weight.

        Raises:
            ValueError: If the base weights were dropped.
        """
        with torch.no_grad():
            delta = self.low_rank_weight(adapter_name)
            if self.has_switched(adapter_name):
                delta.add_(self.frozen_weight(adapter_name)).sub_(self.base.value(self.compute_device))
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight.

        The weight from before is kept, so `unmerge` is exact. A 4-bit base is requantized.

        Args:
            safe_merge (`bool`): Check the merged weight for NaN and infinity first.
            adapter_names (`list[str]`, *optional*): Which adapters; the active ones if `None`.

        Raises:
            ValueError: If `safe_merge` finds a weight that is not finite.
        """
        adapter_names = self._adapters_to_merge(adapter_names)
        if not adapter_names:
            return
        weight = self.merged_weight(self.merged_adapters + adapter_names, safe_merge)
        self.base.replace(self, weight, self.compute_device)
        self.merged_adapters.extend(adapter_names)

    def _adapters_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in self.loqt_B]

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str], safe_merge: bool = False) -> torch.Tensor:
        """W_base plus the changes of the adapters, float32 `[out, in]`.

        Raises:
            ValueError:
                If `safe_merge` finds a weight that is not finite; if the base was dropped and the sum needs it, which that
                of a single adapter that has switched does not.
        """
        # not base + (W − base), which would round
        if len(adapter_names) == 1:
            weight = self.effective_weight(adapter_names[0])
        else:
            base = self.base.value(self.compute_device)
            weight = base + sum(self.effective_weight(name) - base for name in adapter_names)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_names[-1]} seems to be broken"
            )
        return weight

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, or with `merge` a dense layer with the adapters merged.

        A 4-bit base becomes dense in the dtype that it dequantized to: rounded to 4 bits again, the merged weight would
        lose what was learned.
        """
        if not merge:
            self.base.restore(self.compute_device)
        elif self.quantization_backend is None:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            weight = self.merged_weight(self.merged_adapters + self._adapters_to_merge(adapter_names), safe_merge)
            # PEFT takes weight and bias of the module that replaces this one from here
            self.base_layer = dense_layer(self.get_base_layer(), weight, self.weight_dtype)
        base_layer = self.get_base_layer()
        swap_hooks(self, base_layer)
        return base_layer

    def unmerge(self) -> None:
        """Put the base weight from before `merge` back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base.put_back()
        self.merged_adapters.clear()
        self.place()

    def __repr__(self) -> str:
        return "loqt." + super().__repr__()
