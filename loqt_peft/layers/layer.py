"""The tuner layer: forward, gradient tap, switch, and what becomes of the base weight."""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..algorithm.compensation import compensate
from ..algorithm.linear_map import LoQTLinear, weight_gradient
from ..algorithm.precision import without_autocast
from ..algorithm.projection import (
    captured_energy,
    expand,
    is_right,
    project,
    projection_shape,
    random_projection,
    squared_norm,
    trainable_shape,
)
from ..algorithm.quantization import on_device, storage_format, undo_cpu_packing
from ..saving.seal import SEAL_SIZE, base_storage_code, no_sample, sample
from .host_memory import HostCopy, for_device, for_host
from .module_hooks import swap_hooks
from .stopwatch import Stretch, mark
from .training_watch import TrainingWatch
from .weight_guard import UnreadableWeight


if TYPE_CHECKING:
    from ..config import LoQTConfig

# of the int64 buffer `loqt_state`
NUM_UPDATES, UPDATE_PENDING = 0, 1


def source_class(base_layer: nn.Module) -> type[nn.Module]:
    """The class of a layer before transformers quantized it: a `Linear4bit` may stand for a `Conv1D`."""
    return getattr(base_layer, "source_cls", type(base_layer))


def dense_layer(base_layer: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """A base layer with another weight; in place of a `Linear4bit` a new `nn.Linear` or `Conv1D`.

    Args:
        base_layer (`nn.Module`): `nn.Linear`, `Conv1D` or `Linear4bit`.
        weight (`torch.Tensor`): `[out, in]`.
        dtype (`torch.dtype`): Of the layer's weight.
    """
    transposed = issubclass(source_class(base_layer), Conv1D)
    if isinstance(base_layer, bnb.nn.Linear4bit):
        bias, training = base_layer.bias, base_layer.training
        with torch.device("meta"):
            if transposed:
                base_layer = Conv1D(base_layer.out_features, base_layer.in_features)
            else:
                base_layer = nn.Linear(base_layer.in_features, base_layer.out_features, bias=bias is not None)
        base_layer.bias = bias
        base_layer.train(training)
    weight = weight.T if transposed else weight
    original = base_layer.weight
    if (original.shape, original.dtype, original.device) == (weight.shape, dtype, weight.device):
        # no second copy of the model beside weights that are mapped from a file
        original.copy_(weight)
    else:
        base_layer.weight = nn.Parameter(weight.to(dtype, copy=True).contiguous(), requires_grad=False)
    return base_layer


class Switch(NamedTuple):
    """One layer's new state, computed but not yet written.

    Attributes:
        weight (`torch.Tensor`): The requantized weight, in its storage format.
        P (`torch.Tensor`): The projection, in its storage format.
        B (`torch.Tensor`): In the dtype of the trainable matrix.
        statistics (`torch.Tensor`):
            float64 `[6]`: squared norms of the merged s·PB, the merged weight, the quantization error before and after
            compensation, the gradient within the span of P, and the gradient (both zero where none was recorded).
        error (`torch.Tensor`, *optional*):
            With `error_feedback`: W − deq(Q) − s·PB, in the storage format of the weight.
    """

    weight: torch.Tensor
    P: torch.Tensor
    B: torch.Tensor
    statistics: torch.Tensor
    error: torch.Tensor | None = None


class Projected(NamedTuple):
    """What a switch needs of a gradient.

    Attributes:
        P (`torch.Tensor`): The new projection, in its storage format; the old one if the gradient is zero.
        energies (`torch.Tensor`): float32 `[2]`: squared norms of the gradient within the span of P, and of the gradient.
        finite (`torch.Tensor`): 0-d bool; if false, P is of no use.
        work ([`~loqt_peft.layers.stopwatch.Stretch`], *optional*): What it took to make P from the gradient.
    """

    P: torch.Tensor
    energies: torch.Tensor
    finite: torch.Tensor
    work: Stretch | None = None


class _GradientTap(torch.autograd.Function):
    """Identity on a layer's output that adds dL/dW = (dL/dy)ᵀ x to the layer's sink in backward."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, x: torch.Tensor, layer: LoQTLayer) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        # not as a view: models may write to a layer's output, but not to a view that a custom function made
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        ctx.layer.accumulate_gradient(grad_output, ctx.saved_tensors[0])
        return grad_output, None, None


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """0-d bool, on the tensor's device."""
    # a sum is finite only if every term is
    return torch.isfinite(tensor.sum())


# the layers of compiled models that record gradients, by their `_capture_id`: a compiled graph holds no Python object
_capturing: weakref.WeakValueDictionary[int, LoQTLayer] = weakref.WeakValueDictionary()
_capture_ids = itertools.count()


@torch.library.custom_op("loqt_peft::record_gradient", mutates_args=("token",))
def _record_gradient(grad_output: torch.Tensor, x: torch.Tensor, token: torch.Tensor, capture_id: int) -> None:
    layer = _capturing.get(capture_id)
    if layer is not None:
        layer.accumulate_gradient(grad_output, x)


@_record_gradient.register_fake
def _(grad_output, x, token, capture_id) -> None:
    pass


class _CompiledGradientTap(torch.autograd.Function):
    """[`_GradientTap`] without a Python object, for `torch.compile`.

    The token only says that the recording changes something, and so must not be left out.
    """

    @staticmethod
    def forward(ctx, y: torch.Tensor, x: torch.Tensor, token: torch.Tensor, capture_id: int) -> torch.Tensor:
        ctx.save_for_backward(x, token)
        ctx.capture_id = capture_id
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        x, token = ctx.saved_tensors
        _record_gradient(grad_output, x, token, ctx.capture_id)
        return grad_output, None, None, None


def _settle_after_load(layer: LoQTLayer, _incompatible_keys) -> None:
    layer.leave_inference_mode()
    layer._place_base()
    layer._place_error()


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
        # reading `loqt_state` waits for the device: buffer, its version and the values last read from it
        self._state_cache: dict[str, tuple[torch.Tensor, int, list[int]]] = {}
        # of adapters that something must be loaded into before they are used; `verify()` of each does what is left to do
        self.verifications: dict[str, Any] = {}
        self.watch = TrainingWatch()

        self._disable_adapters = False
        self.merged_adapters = []
        # base weight from before `merge`; in a tuple so that a Parameter is not registered
        self._unmerged: tuple[Any, ...] = ()
        self.base_dropped = False
        # of a dropped base
        self._base_sample: tuple[int, torch.Tensor] | None = None

        # name of the adapter that an update of this layer is due of, and whether the gradient is recorded for it
        self._updated_adapter: str | None = None
        self._records = False
        self._offload_gradients = False
        self._is_last_backward: Callable[[], bool] | None = None
        self._capture_id = next(_capture_ids)
        self._capture_token = torch.zeros(1, dtype=torch.float32, device="cpu")
        # forward passes of this step whose backward pass has not come by
        self._calls = 0
        self._gradient: torch.Tensor | HostCopy | None = None
        # of a gradient that is on its way to the host
        self._gradient_is_finite: torch.Tensor | None = None
        self._projected: Projected | None = None

        base_layer = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base_layer)
        # of a 4-bit base the dtype that it dequantizes to
        state = getattr(base_layer.weight, "quant_state", None)
        self._quantized_dtype = None if state is None else state.dtype
        self.register_load_state_dict_post_hook(_settle_after_load)
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.weight.shape
            self.fan_in_fan_out = True
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
            self.fan_in_fan_out = False
        self.shape = (self.out_features, self.in_features)
        self.right = is_right(self.shape)
        if self.quantization_backend is not None:
            # in eval, on processors with AVX512-BF16, bitsandbytes would round the absmax to bfloat16, for good
            undo_cpu_packing(base_layer.weight)
            self._repacks_on_cpu = base_layer.support_avx512bf16_for_cpu
            base_layer.support_avx512bf16_for_cpu = False

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
            config (`LoQTConfig`): Its config; a positive `num_updates` allocates the drifted weight too.
        """
        if self.base_dropped:
            raise ValueError(
                f"Adapter {adapter_name!r} cannot be added: the base weights are gone (retain_base='drop'). "
                "Reload the base model, or train with retain_base='cpu'."
            )
        r = min(r, *self.shape)
        self.r[adapter_name] = r
        # a step of B by Adam of size η moves W by η s √(r/min(in, out)): so as much at every rank, and less in wider layers
        self.scaling[adapter_name] = 16 / math.sqrt(r * min(self.shape)) if scaling == "auto" else scaling
        self.config[adapter_name] = config

        # float32 unless PEFT casts it: a loader that goes by the dtype of this slot must not round what was saved
        device = torch.device("meta" if self._compute_device().type == "meta" else "cpu")
        B = torch.zeros(trainable_shape(self.shape, r), dtype=torch.float32, device=device)
        P = torch.zeros(projection_shape(self.shape, r), dtype=torch.float32, device=device)
        if not config.init_weights:
            nn.init.kaiming_uniform_(B, a=5**0.5)
            nn.init.orthogonal_(P)
        self.loqt_B[adapter_name] = nn.Parameter(B)
        self.loqt_P[adapter_name] = self.projection_format(adapter_name).pack(P)
        self.loqt_state[adapter_name] = torch.zeros(2, dtype=torch.int64, device=device)
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
        self._place_base()

    def verify(self) -> None:
        """Verify what a loader has written into this layer's adapters, unless that was done.

        Raises:
            ValueError: If it is not what was saved, is not meant for this model, or nothing was loaded.
        """
        for verification in list(self.verifications.values()):
            verification.verify()

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
        """Storage format of the drifted weight."""
        config = self.config[adapter_name]
        return storage_format(self.shape, config.quantize_weight, config.double_quant, self.weight_dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Floating dtype of the base weight; of a 4-bit base the dtype that it dequantizes to."""
        return self._quantized_dtype or self.get_base_layer().weight.dtype

    @property
    def weight(self) -> torch.Tensor:
        """The base weight; while an adapter acts, only to ask for its dtype, device and shape."""
        weight = self.get_base_layer().weight
        acts = any(name in self.loqt_B for name in self.active_adapters)
        readable = self.disable_adapters or self.merged or not acts or self.quantization_backend is not None
        if readable or torch.compiler.is_compiling():
            return weight
        return weight.detach().as_subclass(UnreadableWeight)

    def is_drifted(self, adapter_name: str) -> bool:
        """Whether the adapter has been through a switch, so that it holds a weight of its own."""
        # a slot may have been allocated, but nothing loaded into it
        return adapter_name in self.loqt_weight and self._has_updates(adapter_name)

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
        """Make the slots of P and the drifted weight fit tensors that are about to be loaded.

        A dense one keeps the dtype that it was saved in, whatever the dtype of the live base.
        """
        if self.loqt_P[adapter_name].dtype != P.dtype:
            self.loqt_P[adapter_name] = torch.zeros_like(self.loqt_P[adapter_name], dtype=P.dtype)
        self.allocate_weight(adapter_name, weight is not None)
        if weight is not None and self.loqt_weight[adapter_name].dtype != weight.dtype:
            self.loqt_weight[adapter_name] = torch.zeros_like(self.loqt_weight[adapter_name], dtype=weight.dtype)

    def allocate_weight(self, adapter_name: str, drifted: bool) -> None:
        """Allocate or drop the slot of the drifted weight, and that of its error.

        Raises:
            ValueError: If it is to be dropped, and the base weights are gone.
        """
        if drifted and adapter_name not in self.loqt_weight:
            device = self.loqt_P[adapter_name].device
            self.loqt_weight[adapter_name] = self.weight_format(adapter_name).empty(device)
            if self.config[adapter_name].error_feedback:
                place = device if device.type == "meta" else "cpu"
                self.loqt_error[adapter_name] = self.weight_format(adapter_name).empty(place)
        elif not drifted and adapter_name in self.loqt_weight:
            self.require_base("Loading a state from before the first switch")
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
        device = device or self._compute_device()
        for container in (self.loqt_B, self.loqt_P, self.loqt_weight, self.loqt_state, self.loqt_seal):
            if adapter_name in container and container[adapter_name].device.type not in ("meta", device.type):
                container[adapter_name] = container[adapter_name].detach().to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.loqt_B:
            self.require_base("Deleting the adapter")
        super().delete_adapter(adapter_name)
        self._place_base()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.require_base("Disabling the adapter")
        super().enable_adapters(enabled)

    ###############################
    # Update state
    ###############################

    def _state(self, adapter_name: str) -> list[int]:
        buffer = self.loqt_state[adapter_name]
        if buffer.is_meta:
            return [0, 0]
        if buffer.is_inference():
            # it has no version
            return buffer.tolist()
        cached = self._state_cache.get(adapter_name)
        if cached is None or cached[0] is not buffer or cached[1] != buffer._version:
            cached = self._state_cache[adapter_name] = (buffer, buffer._version, buffer.tolist())
        return cached[2]

    def num_updates(self, adapter_name: str) -> int:
        """How many switches the adapter has been through."""
        return self._state(adapter_name)[NUM_UPDATES]

    def update_pending(self, adapter_name: str) -> bool:
        """Whether an update was postponed and waits for the next step."""
        return bool(self._state(adapter_name)[UPDATE_PENDING])

    def set_update_pending(self, adapter_name: str) -> None:
        """Postpone the update to the next step."""
        self._write_state(adapter_name, self.num_updates(adapter_name), True)

    def _write_state(self, adapter_name: str, num_updates: int, pending: bool) -> None:
        state = [num_updates, int(pending)]
        buffer = self.loqt_state[adapter_name]
        # values of the host go along with the call; a copy of a tensor of the host would be waited for
        for element, value in zip(buffer, state, strict=True):
            element.fill_(value)
        self._state_cache[adapter_name] = (buffer, buffer._version, state)

    ###############################
    # Weights
    ###############################

    def projection(self, adapter_name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """P as the forward pass sees it: `[r, in]` if in <= out, else `[out, r]`."""
        return self.projection_format(adapter_name).unpack(self.loqt_P[adapter_name], dtype)

    def _base_weight(self) -> torch.Tensor:
        """The original base weight, float32 `[out, in]`, on the device of the computation."""
        self.require_base("The change of the original weights")
        base_layer = self.get_base_layer()
        current = base_layer.weight
        original = self._unmerged[0] if self._unmerged else current
        undo_cpu_packing(original)
        base_layer.weight = on_device(original, self._compute_device())
        try:
            weight = self.get_base_weight()
        finally:
            base_layer.weight = current
        weight = weight.to(torch.float32)
        return weight.T if self.fan_in_fan_out else weight

    def base_sample(self) -> tuple[int, torch.Tensor]:
        """How the original base weight is stored, and 64 of its elements; NaN if it has no values (yet)."""
        if self.base_dropped:
            return self._base_sample
        weight = self._unmerged[0] if self._unmerged else self.get_base_layer().weight
        if weight.device.type == "meta":
            return base_storage_code(weight), no_sample()
        if self.quantization_backend is None:
            return base_storage_code(weight), sample(weight.detach())
        return base_storage_code(weight), sample(self._base_weight())

    def kept_error(self, adapter_name: str) -> torch.Tensor | None:
        """With `error_feedback`, what the last switch left over of the weight, packed, on the device of the computation."""
        error = self.loqt_error[adapter_name] if adapter_name in self.loqt_error else None
        return None if error is None else error.to(self._compute_device())

    def effective_weight(self, adapter_name: str) -> torch.Tensor:
        """deq(W_q) + s·PB, or W_base + s·PB before the first switch: float32 `[out, in]`."""
        return self.low_rank_weight(adapter_name).add_(self._frozen_weight(adapter_name))

    def _frozen_weight(self, adapter_name: str) -> torch.Tensor:
        if self.is_drifted(adapter_name):
            return self.weight_format(adapter_name).unpack(self.loqt_weight[adapter_name])
        return self._base_weight()

    @without_autocast
    def low_rank_weight(self, adapter_name: str) -> torch.Tensor:
        """s·PB, float32 `[out, in]`."""
        self.verify()
        B = self.loqt_B[adapter_name].detach().float()
        return expand(self.projection(adapter_name), B, self.right).mul_(self.scaling[adapter_name])

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """deq(W_q) − W_base + s·PB, float32, in the layout of the base weight.

        Raises:
            ValueError: If the base weights were dropped.
        """
        with torch.no_grad():
            delta = self.low_rank_weight(adapter_name)
            if self.is_drifted(adapter_name):
                delta.add_(self._frozen_weight(adapter_name)).sub_(self._base_weight())
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    ###############################
    # Base weight
    ###############################

    def _compute_device(self) -> torch.device:
        for weight in self.loqt_weight.values():
            return weight.device
        return self.get_base_layer().weight.device

    @property
    def base_is_offloaded(self) -> bool:
        """Whether the base weight lies on another device than the computation."""
        return self.get_base_layer().weight.device != self._compute_device()

    def require_base(self, action: str) -> None:
        if self.base_dropped:
            raise ValueError(
                f"{action} needs the original base weights, and they were dropped at the first switch "
                "(retain_base='drop'). Reload the base model, or train with retain_base='cpu'."
            )

    @torch.inference_mode(False)
    def _place_base(self) -> None:
        """Put the base weight where `retain_base` wants it, now that adapters drifted, were merged or deleted."""
        if self.base_dropped:
            return
        drifted = [name for name in self.loqt_B if self.is_drifted(name)]
        retain = {self.config[name].retain_base for name in drifted}
        if not drifted or len(drifted) < len(self.loqt_B) or self.merged or "device" in retain:
            self._move_base(self._compute_device())
        elif retain == {"drop"}:
            self._base_sample = self.base_sample()
            weight = self.get_base_layer().weight
            # the (Params4bit) shell stays: it knows how to quantize a merged weight
            if getattr(weight, "quant_state", None) is not None:
                weight.quant_state.absmax = weight.quant_state.absmax.new_empty(0)
            weight.data = weight.data.new_empty(0)
            self.base_dropped = True
        else:
            self._move_base(torch.device("cpu"))

    def _move_base(self, device: torch.device) -> None:
        base_layer = self.get_base_layer()
        weight = base_layer.weight
        if weight.device == device or weight.device.type == "meta":
            return
        if self.quantization_backend is not None:
            # Params4bit takes its quantization state along
            base_layer.weight = weight.to(device)
        else:
            weight.data = weight.data.to(device)

    def restore_base(self) -> None:
        """Bring the original base layer back to the device and to its own ways, for good."""
        self.require_base("Unloading the adapter")
        self._move_base(self._compute_device())
        if self.quantization_backend is not None:
            self.get_base_layer().support_avx512bf16_for_cpu = self._repacks_on_cpu

    def _place_error(self) -> None:
        for adapter_name, error in self.loqt_error.items():
            if error.device.type not in ("cpu", "meta"):
                self.loqt_error[adapter_name] = error.cpu()

    def _apply(self, fn, recurse=True):
        module = super()._apply(fn, recurse)
        # `model.to(device)` brought to the device what was offloaded
        if self.loqt_weight:
            self._place_base()
            self._place_error()
        return module

    ###############################
    # Capture and switch
    ###############################

    @property
    def update_due(self) -> bool:
        """Whether an update of this layer follows the step."""
        return self._updated_adapter is not None

    def needs_gradient(self, adapter_name: str) -> bool:
        """Whether P is made from dL/dW."""
        return self.config[adapter_name].projection != "random"

    def start_capture(
        self, adapter_name: str, offload: bool, is_last_backward: Callable[[], bool] | None = None
    ) -> None:
        """An update follows this step: record dL/dW from now on, in the backward passes of this layer, if P is made from it.

        Args:
            adapter_name (`str`): The adapter that will be updated.
            offload (`bool`):
                Keep on the CPU what has to be kept of the gradient until the switch: the packed P where it is computed in
                the backward pass, else 4 bytes for each element of W. Up to 2 GiB of a process are page-locked (see
                [`~loqt_peft.layers.host_memory.PINNED_BYTES`]), the rest is ordinary memory, which is given back afterwards.
            is_last_backward (`Callable`, *optional*):
                Asked within a backward pass whether it is the step's last. In the last one P is computed as soon as the
                gradient is complete, and the gradient is freed. `None`: the gradient is kept.
        """
        self.stop_capture()
        if _capturing.get(self._capture_id, self) is not self:
            # this layer is a copy
            self._capture_id = next(_capture_ids)
        _capturing[self._capture_id] = self
        self._updated_adapter = adapter_name
        self._records = self.needs_gradient(adapter_name)
        self._offload_gradients = offload
        self._is_last_backward = is_last_backward

    def stop_capture(self) -> tuple[torch.Tensor | None, Projected | None]:
        """Stop recording and hand over what there is.

        Returns:
            The gradient, float32 `[out, in]`, or what was made of it; both `None` if nothing was recorded. A tensor on the
            host may still be on its way there, and is for work on the device's current stream only.
        """
        gradient, projected = self._gradient, self._projected
        self._updated_adapter = self._is_last_backward = self._gradient = self._projected = None
        self._gradient_is_finite = None
        self._records = False
        self._calls = 0
        if projected is not None:
            projected = projected._replace(P=for_device(projected.P))
        return None if gradient is None else for_device(gradient), projected

    @property
    def projected(self) -> Projected | None:
        """What the backward pass has made of the gradient."""
        return self._projected

    @property
    def captured_gradient(self) -> torch.Tensor | None:
        """What has been recorded so far, and not yet been made into a projection; waits for a copy on its way to the host."""
        return None if self._gradient is None else for_host(self._gradient)

    @property
    def is_finite(self) -> torch.Tensor | None:
        """Whether what an update is made of is finite, the gradient or, where none is needed, B: a 0-d tensor; `None` if there
        is nothing yet."""
        if self.update_due and not self._records:
            return torch.isfinite(self.loqt_B[self._updated_adapter].detach().sum(dtype=torch.float32))
        if self._projected is not None:
            return self._projected.finite
        if self._gradient_is_finite is not None:
            return self._gradient_is_finite
        return None if self._gradient is None else _is_finite(self._gradient)

    @torch.no_grad()
    @without_autocast
    def accumulate_gradient(self, grad_output: torch.Tensor, x: torch.Tensor) -> None:
        """Add `grad_outputᵀ x` to the recorded gradient.

        Args:
            grad_output (`torch.Tensor`): dL/dy, `[..., out]`.
            x (`torch.Tensor`): The layer's input, `[..., in]`.

        Raises:
            RuntimeError: If a backward pass follows the one that was said to be the last.
        """
        rows = grad_output.reshape(-1, self.out_features), x.reshape(-1, self.in_features)
        self.add_gradient(weight_gradient(*rows).float())

    @torch.no_grad()
    def add_gradient(self, gradient: torch.Tensor) -> None:
        """Add dL/dW of one call of this layer to the recorded gradient.

        Args:
            gradient (`torch.Tensor`): float32 `[out, in]`; used up.

        Raises:
            RuntimeError: If a backward pass follows the one that was said to be the last.
        """
        if self._projected is not None:
            raise RuntimeError(
                "A backward pass follows the one that was said to be the step's last. Call `begin_step(step, "
                "is_last_backward)` with a function that is true in the last backward pass before `optimizer.step()` only, "
                "or without one."
            )
        # a module may run several times in a forward pass
        self._calls -= 1
        if self._gradient is not None:
            gradient.add_(for_device(self._gradient).to(gradient.device, non_blocking=True))
        if self._calls == 0 and self._is_last_backward is not None and self._is_last_backward():
            self._gradient = self._gradient_is_finite = None
            projected = self.project_gradient(self._updated_adapter, gradient)
            if self._offload_gradients:
                projected = projected._replace(P=HostCopy(projected.P))
            self._projected = projected
        elif self._offload_gradients and self._calls <= 0:
            # made where the values are: nobody may read them on the host without waiting
            self._gradient_is_finite = _is_finite(gradient)
            previous = self._gradient if isinstance(self._gradient, HostCopy) else None
            self._gradient = HostCopy(gradient, previous)
        else:
            self._gradient, self._gradient_is_finite = gradient, None

    @torch.no_grad()
    @without_autocast
    def project_gradient(self, adapter_name: str, gradient: torch.Tensor) -> Projected:
        """From dL/dW to P (paper Algorithm 1, line 7).

        The host waits for the device in the decomposition, of which torch checks whether it converged, and nowhere else.

        Args:
            adapter_name (`str`): The adapter.
            gradient (`torch.Tensor`): dL/dW at the merged weight, float32 `[out, in]`; used up.

        Returns:
            [`Projected`]
        """
        start = mark(gradient.device)
        projection_format = self.projection_format(adapter_name)
        energy = squared_norm(gradient)
        finite = torch.isfinite(energy)
        # a decomposition must not see what is not finite
        gradient.masked_fill_(~finite, 0)
        new = projection_format.pack(project(gradient, self.r[adapter_name], self.config[adapter_name].projection))
        P = torch.where(energy > 0, new, self.loqt_P[adapter_name])
        captured = captured_energy(gradient, projection_format.unpack(P))
        return Projected(P, torch.stack([captured, energy]), finite, Stretch(start, mark(gradient.device)))

    def draw_projection(self, adapter_name: str) -> Projected:
        """Random directions, for which no gradient is needed; the energies are zero."""
        device = self.loqt_P[adapter_name].device
        P = random_projection(self.shape, self.r[adapter_name], self.projection_seed(adapter_name), device)
        return Projected(
            self.projection_format(adapter_name).pack(P),
            torch.zeros(2, dtype=torch.float32, device=device),
            torch.ones((), dtype=torch.bool, device=device),
        )

    def projection_seed(self, adapter_name: str) -> int:
        """Of random directions; another one for each layer and update."""
        # from the user's seed, as the Trainer sets it again when it resumes
        return hash((torch.initial_seed(), self._seed, self.num_updates(adapter_name))) % 2**63

    @torch.no_grad()
    @without_autocast
    def compute_switch(self, adapter_name: str, projected: Projected | None) -> Switch:
        """Merge and compensate (paper Algorithm 1, lines 5-10), without writing anything.

        Args:
            adapter_name (`str`): The adapter.
            projected ([`Projected`], *optional*): The new projection; `None` keeps the old one.

        Returns:
            [`Switch`]
        """
        B, weight_format = self.loqt_B[adapter_name], self.weight_format(adapter_name)
        W = self.low_rank_weight(adapter_name)
        change = squared_norm(W)
        W.add_(self._frozen_weight(adapter_name))
        if (error := self.kept_error(adapter_name)) is not None:
            W.add_(weight_format.unpack(error))
        if projected is None:
            P, energies = self.loqt_P[adapter_name], W.new_zeros(2)
        else:
            P, energies = projected.P.to(W.device, non_blocking=True), projected.energies
        # P is zero where no gradient has ever come by: B then stays zero
        unpacked, scale = self.projection_format(adapter_name).unpack(P), self.scaling[adapter_name]
        steps = self.config[adapter_name].compensation_steps
        new = compensate(W, unpacked, weight_format, scale, steps, B.dtype)
        norms = torch.stack([change, squared_norm(W)])
        errors = torch.stack([new.error_before, new.error_after])
        error = None
        if self.config[adapter_name].error_feedback:
            # of what the forward pass will see
            W.sub_(weight_format.unpack(new.weight)).sub_(expand(unpacked, new.B.float(), self.right).mul_(scale))
            error = weight_format.pack(W)
        return Switch(new.weight, P, new.B, torch.cat([norms, errors, energies]).double(), error)

    def empty_switch(self, adapter_name: str) -> Switch:
        """A [`Switch`] of the right shapes and dtypes, to be received from another process."""
        device, B = self.loqt_P[adapter_name].device, self.loqt_B[adapter_name]
        return Switch(
            self.weight_format(adapter_name).empty(device),
            self.projection_format(adapter_name).empty(device),
            torch.empty_like(B),
            torch.zeros(6, dtype=torch.float64, device=device),
            self.weight_format(adapter_name).empty(device) if self.config[adapter_name].error_feedback else None,
        )

    @torch.no_grad()
    def write_switch(self, adapter_name: str, switch: Switch) -> None:
        """Make the computed state the layer's own. B stays the Parameter that the optimizer holds."""
        self.loqt_P[adapter_name] = switch.P
        self.loqt_B[adapter_name].copy_(switch.B)
        self.loqt_weight[adapter_name] = switch.weight
        if switch.error is not None:
            self.loqt_error[adapter_name] = switch.error.cpu()
        self._write_state(adapter_name, self.num_updates(adapter_name) + 1, False)
        self._place_base()


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
        records = self.training and self._records and self._updated_adapter in adapters
        if records and not torch.compiler.is_compiling():
            self._count_call()
        if fuses:
            # which records the gradient by itself
            y = self._fused_forward(x, adapters[0], records)
        else:
            y = self._unfused_forward(x, adapters)
            if records and torch.is_grad_enabled():
                y = self._tap(x, y)
        if self.training and not records and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for adapter_name in adapters:
                self.watch.on_forward(self, adapter_name)
        return y.view(*x.shape[:-1], self.out_features) if fuses else y

    def _tap(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            # calls are not counted, so that the gradient is kept until the end of the step
            return _CompiledGradientTap.apply(y, x, self._capture_token, self._capture_id)
        return _GradientTap.apply(y, x, self)

    def _count_call(self) -> None:
        # not counted when a checkpointed forward pass runs again, within the backward pass
        if torch._C._current_graph_task_id() == -1:
            self._calls += 1

    def _base_forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.merged:
            self.require_base("The base model's output")
        base_layer = self.get_base_layer()
        if torch.is_grad_enabled():
            undo_cpu_packing(base_layer.weight)
        if base_layer.weight.device == x.device:
            return base_layer(x)
        return functional_call(base_layer, {"weight": on_device(base_layer.weight, x.device)}, x)

    def _can_fuse(self, x: torch.Tensor, adapters: list[str]) -> bool:
        # torch.compile fuses by itself
        if len(adapters) > 1 or not self.is_drifted(adapters[0]) or torch.compiler.is_compiling():
            return False
        compute_dtype, output_dtype = self._weight_dtypes(x)
        return compute_dtype == output_dtype == self._low_rank_dtype(x, adapters[0])

    def _fused_forward(self, x: torch.Tensor, adapter_name: str, records: bool = False) -> torch.Tensor:
        """`[..., in]` to `[n, out]`; with `records` its backward pass adds dL/dW to the layer's sink."""
        dtype, bias = self._low_rank_dtype(x, adapter_name), self.get_base_layer().bias
        return LoQTLinear.apply(
            x,
            self.loqt_B[adapter_name].to(dtype),
            None if bias is None else bias.to(dtype),
            self.loqt_weight[adapter_name],
            self.loqt_P[adapter_name],
            self.weight_format(adapter_name),
            self.projection_format(adapter_name),
            self.scaling[adapter_name],
            self.right,
            self.add_gradient if records and torch.is_grad_enabled() else None,
        )

    def _unfused_forward(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        y = self._weight_forward(x, adapters)
        dtype = y.dtype
        for adapter_name in adapters:
            y = y + self._low_rank_forward(x, adapter_name)
        return y.to(dtype)

    def _weight_forward(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        drifted = [name for name in adapters if self.is_drifted(name)]
        y = self._base_forward(x) if len(drifted) != 1 else None
        for adapter_name in drifted:
            own = self._drifted_forward(x, adapter_name)
            # every further adapter adds its own change to the base: deq(W_q) − W_base
            y = own if len(drifted) == 1 else y + (own - self._base_forward(x))
        return y

    def _weight_dtypes(self, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
        """In which the product with W is computed, and returned."""
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            return dtype, dtype
        if self.quantization_backend is not None:
            return self.get_base_layer().compute_dtype or x.dtype, x.dtype
        return self.weight_dtype, self.weight_dtype

    def _low_rank_dtype(self, x: torch.Tensor, adapter_name: str) -> torch.dtype:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self._cast_input_dtype(x, self.loqt_B[adapter_name].dtype).dtype

    def _drifted_forward(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
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
        base_layer = self.get_base_layer()
        if self.fan_in_fan_out:
            weight = weight.T
        original = base_layer.weight
        if self.quantization_backend is None:
            # a new Parameter, so that the original stays as it is
            base_layer.weight = nn.Parameter(weight.to(self.weight_dtype).contiguous(), requires_grad=False)
        else:
            self._move_base(self._compute_device())
            original = base_layer.weight
            self.set_base_weight(weight.contiguous())
            # the backend marks the weight that it replaces as not yet quantized
            original.bnb_quantized = True
        if not self._unmerged:
            self._unmerged = (original,)
        self.merged_adapters.extend(adapter_names)

    def _adapters_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in self.loqt_B]

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str], safe_merge: bool = False) -> torch.Tensor:
        """W_base plus the changes of the adapters, float32 `[out, in]`.

        Raises:
            ValueError:
                If `safe_merge` finds a weight that is not finite; if the base was dropped and the sum needs it, which that
                of a single drifted adapter does not.
        """
        # not base + (W − base), which would round
        if len(adapter_names) == 1:
            weight = self.effective_weight(adapter_names[0])
        else:
            base = self._base_weight()
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
            self.restore_base()
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
        self.get_base_layer().weight = self._unmerged[0]
        self._unmerged = ()
        self.merged_adapters.clear()
        self._move_base(self._compute_device())
        self._place_base()

    def __repr__(self) -> str:
        return "loqt." + super().__repr__()
