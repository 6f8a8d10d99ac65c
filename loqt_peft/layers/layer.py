"""What a layer holds of each of its adapters, and how an update changes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..advice import AUTO_CONSTANT
from ..algorithm.precision import without_autocast
from ..algorithm.projection import (
    is_right,
    projection_shape,
    trainable_shape,
)
from ..algorithm.quantization import storage_format
from ..algorithm.switch import (
    low_rank_product,
)
from ..compat import BufferDict
from ..dtensor import full
from ..saving.seal import SEAL_SIZE
from .base_weight import BaseWeight
from .capture import GradientCapture
from .training_watch import TrainingWatch
from .update_state import STATE_SIZE, UpdateState


if TYPE_CHECKING:
    from ..config import LoQTConfig


def _settle_after_load(layer: LoQTLayer, _incompatible_keys) -> None:
    layer.leave_inference_mode()
    layer.place()


def _auto_scale(shape: tuple[int, int], r: int) -> float:
    # a step of B by Adam of size η moves W by η s √(r/min(in, out)): so as much at every rank, and less in wider layers
    return AUTO_CONSTANT / math.sqrt(r * min(shape))


def _initial_factors(
    shape: tuple[int, int], r: int, device: torch.device, identity: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """B and P of a new adapter: zeros, with which it is the identity, or random."""
    # float32 unless PEFT casts it: a loader that goes by the dtype of this slot must not round what was saved
    B = torch.zeros(trainable_shape(shape, r), dtype=torch.float32, device=device)
    P = torch.zeros(projection_shape(shape, r), dtype=torch.float32, device=device)
    if not identity:
        nn.init.kaiming_uniform_(B, a=5**0.5)
        nn.init.orthogonal_(P)
    return B, P


def _check_dtype(config: LoQTConfig, dtype: torch.dtype) -> None:
    for name in ("quantize_weight", "quantize_projection"):
        if getattr(config, name) is not None and dtype == torch.float64:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not allowed on a base in torch.float64, to which bitsandbytes does not "
                "dequantize. Load the base in float32, bfloat16 or float16, or set it to None."
            )


class LoQTLayer(BaseTunerLayer):
    """State of the LoQT adapters of one linear layer.

    Per adapter: `loqt_B`, the only trainable matrix; `loqt_P`, the projection; `loqt_state`, the number of updates and
    whether one is pending; `loqt_seal`, zeros but in a saved adapter; and, from the first switch on, `loqt_weight`, the
    weight with everything learned before that switch merged in, and with `error_feedback` `loqt_error`, what it lacks of
    that, on the host. The base layer is never written to: an adapter is the change deq(W_q) − W_base + s·PB.
    """

    adapter_layer_names: tuple[str, ...] = ("loqt_B",)
    other_param_names: tuple[str, ...] = (
        "r",
        "scaling",
        "config",
        "loqt_P",
        "loqt_weight",
        "loqt_error",
        "loqt_state",
        "loqt_seal",
        "verifications",
    )

    def __init__(self, base_layer: nn.Module, seed: int = 0) -> None:
        self.base_layer = base_layer
        # tells the layer's random projections from those of other layers
        self._seed = seed
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.config: dict[str, LoQTConfig] = {}
        self.loqt_B = nn.ParameterDict({})
        self.loqt_P = BufferDict({}, persistent=True)
        self.loqt_weight = BufferDict({}, persistent=True)
        self.loqt_error = BufferDict({}, persistent=True)
        self.loqt_state = BufferDict({}, persistent=True)
        self.loqt_seal = BufferDict({}, persistent=True)
        self.updates = UpdateState(self.loqt_state)
        # of adapters that something must be loaded into before they are used; `verify()` of each does what is left to do
        self.verifications: dict[str, Any] = {}
        self.watch = TrainingWatch()

        self._disable_adapters = False
        self.merged_adapters = []
        self.base = BaseWeight(self.get_base_layer())
        self.capture = GradientCapture()
        self.quantization_backend = self.base.backend
        self.register_load_state_dict_post_hook(_settle_after_load)
        self.fan_in_fan_out = self.base.transposed
        self.shape = self.out_features, self.in_features = self.base.shape
        self.right = is_right(self.shape)

    ###############################
    # Adapters
    ###############################

    # a model is often loaded in inference mode, and then used outside of it
    @torch.inference_mode(False)
    def update_layer(self, adapter_name: str, r: int, scaling: float | Literal["auto"], config: LoQTConfig) -> None:
        """Add an adapter.

        Args:
            adapter_name (`str`): Its name.
            r (`int`): Rank; clamped to min(in, out).
            scaling (`float`): s, or `"auto"`: 16 / √(r·min(in, out)).
            config (`LoQTConfig`): Its config; a positive `num_updates` allocates its own weight too.
        """
        if self.base.is_sharded:
            self.base.require(f"Adding adapter {adapter_name!r}")
        if self.base.dropped:
            raise ValueError(
                f"Adapter {adapter_name!r} cannot be added: the base weights are gone (retain_base='drop'). "
                "Reload the base model, or train with retain_base='cpu'."
            )
        _check_dtype(config, self.weight_dtype)
        r = min(r, *self.shape)
        self.r[adapter_name] = r
        self.scaling[adapter_name] = _auto_scale(self.shape, r) if scaling == "auto" else scaling
        self.config[adapter_name] = config

        device = torch.device("meta" if self.compute_device.type == "meta" else "cpu")
        B, P = _initial_factors(self.shape, r, device, identity=config.init_weights)
        self.loqt_B[adapter_name] = nn.Parameter(B)
        self.loqt_P[adapter_name] = self.projection_format(adapter_name).pack(P)
        self.loqt_state[adapter_name] = torch.zeros(STATE_SIZE, dtype=torch.int64, device=device)
        self.loqt_seal[adapter_name] = torch.zeros(SEAL_SIZE, dtype=torch.int64, device=device)
        self.allocate_weight(adapter_name, config.num_updates > 0)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self.watch.observe(self, adapter_name)

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Give an adapter the state of another one of the same config; they share no memory."""
        self.loqt_B[target].data = self.loqt_B[source].detach().clone()
        for container in (self.loqt_P, self.loqt_weight, self.loqt_error, self.loqt_state):
            if source in container:
                container[target] = container[source].clone()
            elif target in container:
                del container[target]
        self.place()

    def verify(self, adapter_name: str) -> None:
        """Before an adapter is used, verify what a loader has written into it, unless that was done.

        Raises:
            ValueError: If it is not what was saved, is not meant for this model, or nothing was loaded.
        """
        if adapter_name in self.verifications:
            self.verifications[adapter_name].verify()

    @torch.inference_mode(False)
    @torch.no_grad()
    def leave_inference_mode(self) -> None:
        """Replace tensors that were loaded in inference mode: outside of it they can neither be written to nor trained."""
        for adapter_name, B in self.loqt_B.items():
            if B.is_inference():
                self.loqt_B[adapter_name] = nn.Parameter(B.clone(), requires_grad=B.requires_grad)
        for container in (self.loqt_P, self.loqt_weight, self.loqt_error, self.loqt_state, self.loqt_seal):
            for adapter_name, buffer in container.items():
                if buffer.is_inference():
                    container[adapter_name] = buffer.clone()

    def projection_format(self, adapter_name: str):
        """Storage format of P."""
        config = self.config[adapter_name]
        shape = projection_shape(self.shape, self.r[adapter_name])
        return storage_format(shape, config.quantize_projection, config.double_quant, self.weight_dtype)

    def weight_format(self, adapter_name: str):
        """Storage format of the adapter's own weight."""
        config = self.config[adapter_name]
        return storage_format(self.shape, config.quantize_weight, config.double_quant, self.weight_dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Floating dtype of the base weight; of a 4-bit base the dtype that it dequantizes to."""
        return self.base.dtype

    def has_switched(self, adapter_name: str) -> bool:
        """Whether the adapter has been through a switch, so that it holds a weight of its own."""
        # a slot may have been allocated, but nothing loaded into it
        return adapter_name in self.loqt_weight and self._has_updates(adapter_name)

    def uses_own_weight(self, adapter_name: str) -> bool:
        """Whether the layer computes with the adapter's own weight: from the first switch on, under FSDP2 from the start."""
        return self.base.is_sharded or self.has_switched(adapter_name)

    # a graph is compiled anew when a slot comes or goes
    @torch.compiler.assume_constant_result
    def _has_updates(self, adapter_name: str) -> bool:
        return self.num_updates(adapter_name) > 0

    def tensor_shapes(self, adapter_name: str) -> dict[str, torch.Size]:
        """Shapes of the tensors that a saved adapter holds of this layer."""
        return {
            "loqt_B": self.loqt_B[adapter_name].shape,
            "loqt_P": self.loqt_P[adapter_name].shape,
            "loqt_weight": self.weight_format(adapter_name).empty("meta").shape,
            "loqt_state": self.loqt_state[adapter_name].shape,
        }

    @torch.inference_mode(False)
    def allocate(self, adapter_name: str, P: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Make the slots of P and the adapter's own weight fit tensors that are about to be loaded.

        A dense one keeps the dtype that it was saved in, whatever the dtype of the live base.
        """
        if self.base.is_sharded:
            self._check_sharded_slots(adapter_name, P, weight)
            return
        if self.loqt_P[adapter_name].dtype != P.dtype:
            self.loqt_P[adapter_name] = torch.zeros_like(self.loqt_P[adapter_name], dtype=P.dtype)
        self.allocate_weight(adapter_name, weight is not None)
        if weight is not None and self.loqt_weight[adapter_name].dtype != weight.dtype:
            self.loqt_weight[adapter_name] = torch.zeros_like(self.loqt_weight[adapter_name], dtype=weight.dtype)

    def _check_sharded_slots(self, adapter_name: str, P: torch.Tensor, weight: torch.Tensor | None) -> None:
        if weight is None and self.has_switched(adapter_name):
            self.base.require("Loading a state from before the first switch")
        for name, slot, tensor in (("P", self.loqt_P, P), ("W", self.loqt_weight, weight)):
            if tensor is not None and slot[adapter_name].dtype != tensor.dtype:
                raise ValueError(
                    f"{name} was saved in {tensor.dtype}, and the model that FSDP2 shards holds it in "
                    f"{slot[adapter_name].dtype}. Load the base model in {tensor.dtype}."
                )

    def allocate_weight(self, adapter_name: str, switched: bool) -> None:
        """Allocate or drop the slot of the adapter's own weight, and that of its error.

        Raises:
            ValueError: If it is to be dropped, and the base weights are gone.
        """
        if switched and adapter_name not in self.loqt_weight:
            device = self.loqt_P[adapter_name].device
            self.loqt_weight[adapter_name] = self.weight_format(adapter_name).empty(device)
            if self.config[adapter_name].error_feedback:
                place = device if device.type == "meta" else "cpu"
                self.loqt_error[adapter_name] = self.weight_format(adapter_name).empty(place)
        elif not switched and adapter_name in self.loqt_weight:
            self.base.require("Loading a state from before the first switch")
            del self.loqt_weight[adapter_name]
            if adapter_name in self.loqt_error:
                del self.loqt_error[adapter_name]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # `load_state_dict` drops keys without a slot, so the slots are made to fit before the children load
        for adapter_name in self.loqt_B:
            P = state_dict.get(f"{prefix}loqt_P.{adapter_name}")
            if P is not None:
                self.allocate(adapter_name, P, state_dict.get(f"{prefix}loqt_weight.{adapter_name}"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would follow an offloaded base weight, and round a loaded B to the dtype of the base
        device = device or self.compute_device
        for container in (self.loqt_B, self.loqt_P, self.loqt_weight, self.loqt_state, self.loqt_seal):
            if adapter_name in container and container[adapter_name].device.type not in ("meta", device.type):
                container[adapter_name] = container[adapter_name].detach().to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.loqt_B:
            self.base.require("Deleting the adapter")
        super().delete_adapter(adapter_name)
        self.place()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.base.require("Disabling the adapter")
        super().enable_adapters(enabled)

    ###############################
    # Updates
    ###############################

    def num_updates(self, adapter_name: str) -> int:
        """How many updates the adapter has been through."""
        return self.updates.number(adapter_name)

    def update_pending(self, adapter_name: str) -> bool:
        """Whether an update was postponed and waits for the next step."""
        return self.updates.pending(adapter_name)

    def needs_gradient(self, adapter_name: str) -> bool:
        """Whether P is made from dL/dW."""
        return self.config[adapter_name].projection != "random"

    def projection_seed(self, adapter_name: str) -> int:
        """Of random directions; another one for each layer and update."""
        # from the user's seed, as the Trainer sets it again when it resumes
        return hash((torch.initial_seed(), self._seed, self.num_updates(adapter_name))) % 2**63

    ###############################
    # Weights
    ###############################

    def projection(self, adapter_name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """P as the forward pass sees it: `[r, in]` if in <= out, else `[out, r]`."""
        return self.projection_format(adapter_name).unpack(full(self.loqt_P[adapter_name]), dtype)

    def kept_error(self, adapter_name: str) -> torch.Tensor | None:
        """With `error_feedback`, what the last switch left over of the weight, packed, on the device of the computation."""
        error = self.loqt_error[adapter_name] if adapter_name in self.loqt_error else None
        return None if error is None else error.to(self.compute_device)

    def frozen_weight(self, adapter_name: str) -> torch.Tensor:
        """deq(W_q), or W_base before the first switch: float32 `[out, in]`."""
        if self.has_switched(adapter_name):
            return self.weight_format(adapter_name).unpack(full(self.loqt_weight[adapter_name]))
        return self.base.value(self.compute_device)

    @without_autocast
    def low_rank_weight(self, adapter_name: str) -> torch.Tensor:
        """s·PB, float32 `[out, in]`."""
        self.verify(adapter_name)
        B = full(self.loqt_B[adapter_name].detach())
        return low_rank_product(B, self.projection(adapter_name), self.scaling[adapter_name], self.right)

    ###############################
    # Placing
    ###############################

    @property
    def compute_device(self) -> torch.device:
        """Where the layer computes; a base weight may lie elsewhere."""
        if self.base.is_sharded:
            # with CPU offload the parts of W lie elsewhere
            return self.base.device
        for weight in self.loqt_weight.values():
            return weight.device
        return self.base.device

    @property
    def base_is_offloaded(self) -> bool:
        """Whether the base weight lies on another device than the computation."""
        return self.base.device != self.compute_device

    @torch.inference_mode(False)
    def place(self) -> None:
        """Put the base weight where `retain_base` wants it, and kept errors on the host, now that adapters have switched, or
        were merged, moved or deleted."""
        for adapter_name, error in self.loqt_error.items():
            if error.device.type not in ("cpu", "meta"):
                self.loqt_error[adapter_name] = error.cpu()
        switched = [name for name in self.loqt_B if self.has_switched(name)]
        retain = {self.config[name].retain_base for name in switched}
        if self.base.is_sharded:
            if len(switched) == len(self.loqt_B) and retain == {"drop"}:
                self.base.drop(self.compute_device)
            return
        if self.base.dropped:
            # nothing but its device is left of it
            self.base.move(self.compute_device)
            return
        if not switched or len(switched) < len(self.loqt_B) or self.merged or "device" in retain:
            self.base.move(self.compute_device)
        elif retain == {"drop"}:
            self.base.drop(self.compute_device)
        else:
            self.base.move(torch.device("cpu"))

    def _apply(self, fn, recurse=True):
        module = super()._apply(fn, recurse)
        # `model.to(device)` brought to the device what was offloaded
        if self.loqt_weight:
            self.place()
        return module
