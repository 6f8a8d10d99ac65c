"""How the matrices of an adapter are stored: packed 4-bit (bitsandbytes) or dense.

A packed matrix is *one* flat `uint8` tensor, and its layout is a pure function of shape and format. An integer tensor is
cast by nothing on its way through `model.to(dtype)`, `autocast_adapter_dtype` or a low-memory load, so the absmax keeps
its float32 bits.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import cache

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_blockwise,
)

from ..compat import unpack_from_cpu
from .packed_layout import BLOCKSIZE, NESTED_BLOCKSIZE, packed_bytes, packed_parts
from .precision import plain_defaults


# of [-1, 1] on the CPU, finer than the distance of NF4's levels
_BINS = 64
# blocks that the CPU quantizes at once, within its cache
_CHUNK = 2048

_dynamic_maps: dict[torch.device, torch.Tensor] = {}


def _dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 levels to which double quantization rounds an absmax; building it takes longer than using it."""
    if device not in _dynamic_maps:
        with plain_defaults():
            levels = create_dynamic_map()
        _dynamic_maps[device] = levels.to(device)
    return _dynamic_maps[device]


@cache
def _make_portable_tables(quant_type: str, device_type: str) -> None:
    """Let bitsandbytes make the tables that its portable kernels keep for the life of the process."""
    with plain_defaults():
        _bitsandbytes_quantize(torch.zeros(1, BLOCKSIZE, dtype=torch.float32, device=device_type), quant_type)


def _bitsandbytes_quantize(matrix: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 absmax of a contiguous matrix."""
    # `quantize_4bit` would also copy a table of levels from the host, for which the host waits
    return torch.ops.bitsandbytes.quantize_4bit.default(matrix, BLOCKSIZE, quant_type, torch.uint8)


@cache
def _nf4_bins() -> tuple[torch.Tensor, torch.Tensor]:
    """For rounding x in [-1, 1] to the nearest of NF4's 16 levels with two look-ups.

    The bins are finer than the levels, so that at most one bound between two levels lies in each.

    Returns:
        Of each of the `_BINS + 1` bins (the last one for x = 1) the number of bounds below it, and the next bound;
        float32.
    """
    with plain_defaults():
        levels = get_4bit_type("nf4", device="cpu")
        bounds = (levels[:-1] + levels[1:]) / 2
        # what float32 may put into a neighbouring bin
        edges = torch.arange(_BINS + 1) * (2 / _BINS) - 1 - 1e-6
        below = torch.searchsorted(bounds, edges)
        return below.float(), torch.cat([bounds, torch.tensor([torch.inf])])[below]


def _quantize_nf4_on_cpu(matrix: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes' kernel for the CPU does (0.50.2), bit for bit, in a fraction of its time.

    Args:
        matrix (`torch.Tensor`): Floating, contiguous, of whole blocks.
        codes (`torch.Tensor`): uint8 `[n / 2]`, written to.

    Returns:
        `torch.Tensor`: absmax, float32 `[n / 64]`.
    """
    below, following = _nf4_bins()
    blocks = matrix.view(-1, BLOCKSIZE)
    absmax = blocks.new_empty(blocks.shape[0], dtype=torch.float32)
    middle = absmax.new_tensor(_BINS / 2)
    for start in range(0, blocks.shape[0], _CHUNK):
        chunk = blocks[start : start + _CHUNK].float()
        maxima = torch.amax(chunk.abs(), dim=1)
        absmax[start : start + _CHUNK] = maxima
        scaled = (chunk * maxima.clamp(min=1e-38).reciprocal().unsqueeze(1)).nan_to_num_(0).view(-1)
        bins = torch.add(middle, scaled, alpha=_BINS / 2).int()
        following_bound = following.index_select(0, bins)
        nearest = below.index_select(0, bins).add_(torch.gt(scaled, following_bound, out=scaled)).view(-1, 2)
        # two codes to a byte, the first one in its upper half
        codes[start * BLOCKSIZE // 2 :][: nearest.shape[0]] = torch.add(nearest[:, 1], nearest[:, 0], alpha=16)
    return absmax


@dataclass(frozen=True)
class FourBitFormat:
    """A `[rows, columns]` matrix in 4-bit blocks of 64 along the rows' flattened order, laid out as by [`packed_parts`].

    Args:
        shape (`tuple[int, int]`): Shape of the matrix.
        quant_type (`str`): `"nf4"` or `"fp4"`.
        double_quant (`bool`): Whether the absmax is quantized to 8 bits too.
    """

    shape: tuple[int, int]
    quant_type: str = "nf4"
    double_quant: bool = False

    # name -> (offset, bytes)
    _parts: dict[str, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", packed_parts(self.shape, self.double_quant))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensor."""
        return packed_bytes(self.shape, self.double_quant)

    def _part(self, packed: torch.Tensor, name: str) -> torch.Tensor:
        offset, size = self._parts[name]
        return packed[offset : offset + size]

    @property
    def blocksize(self) -> int:
        """Elements that share an absmax."""
        return BLOCKSIZE

    def parts(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Copies of a packed matrix's parts: uint8 codes; the absmax, float32, or uint8 with `nested_absmax` and `offset`."""
        dtypes = {"codes": torch.uint8, "absmax": torch.uint8 if self.double_quant else torch.float32}
        parts = {n: self._part(packed, n).clone().view(dtypes.get(n, torch.float32)) for n in self._parts}
        if self.double_quant:
            parts["offset"] = parts["offset"][0]
        return parts

    def nested_state(self, nested_absmax: torch.Tensor | None) -> QuantState | None:
        """bitsandbytes' state of an absmax that is quantized itself, from that one's own absmax; `None` if it is not."""
        if not self.double_quant:
            return None
        return QuantState(
            absmax=nested_absmax,
            code=_dynamic_map(nested_absmax.device),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )

    @property
    def is_lossless(self) -> bool:
        """Whether a float32 matrix comes back as it was."""
        return False

    def empty(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The packed zero matrix: uint8 `[nbytes]`."""
        return torch.zeros(self.nbytes, dtype=torch.uint8, device=device)

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        """Quantize a floating `[rows, columns]` matrix to uint8 `[nbytes]`."""
        packed = self.empty(matrix.device)
        matrix = matrix.contiguous()
        if self.quant_type == "nf4" and matrix.device.type == "cpu" and matrix.numel() % BLOCKSIZE == 0:
            absmax = _quantize_nf4_on_cpu(matrix, self._part(packed, "codes"))
        else:
            _make_portable_tables(self.quant_type, matrix.device.type)
            codes, absmax = _bitsandbytes_quantize(matrix, self.quant_type)
            self._part(packed, "codes").copy_(codes.flatten())
        if self.double_quant:
            # as `quantize_4bit` does with `compress_statistics`
            offset = absmax.mean()
            absmax, state = quantize_blockwise(
                absmax - offset, code=_dynamic_map(absmax.device), blocksize=NESTED_BLOCKSIZE
            )
            self._part(packed, "absmax").copy_(absmax)
            self._part(packed, "nested_absmax").view(torch.float32).copy_(state.absmax)
            self._part(packed, "offset").view(torch.float32).copy_(offset)
        else:
            self._part(packed, "absmax").view(torch.float32).copy_(absmax)
        return packed

    def _quant_state(self, packed: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, QuantState]:
        codes = self._part(packed, "codes").view(-1, 1)
        absmax = self._part(packed, "absmax")
        state2, offset = None, None
        if self.double_quant:
            state2 = self.nested_state(self._part(packed, "nested_absmax").view(torch.float32))
            offset = self._part(packed, "offset").view(torch.float32)[0]
        else:
            absmax = absmax.view(torch.float32)
        state = QuantState(
            absmax=absmax,
            shape=torch.Size(self.shape),
            dtype=dtype,
            blocksize=BLOCKSIZE,
            quant_type=self.quant_type,
            offset=offset,
            state2=state2,
        )
        return codes, state

    def unpack(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dequantize to `[rows, columns]` in `dtype` (float32, bfloat16 or float16)."""
        codes, state = self._quant_state(packed, dtype)
        # bitsandbytes (0.50.2) takes the wrong absmax on processors with AVX512 where rows are not whole blocks, but there is
        # one row only
        state.shape = torch.Size((1, math.prod(self.shape)))
        return dequantize_4bit(codes, state).view(self.shape)

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ unpack(packed).T + bias` in the dtype of x; autograd keeps the packed matrix only."""
        if x.device.type == "cpu" and self.shape[1] % BLOCKSIZE:
            # for the same reason
            if torch.compiler.is_compiling():
                return F.linear(x, self.unpack(packed, x.dtype), bias)
            return _UnpackedLinear.apply(x, packed, bias, self)
        codes, state = self._quant_state(packed, x.dtype)
        return bnb.matmul_4bit(x, codes, quant_state=state, bias=bias)


class _UnpackedLinear(torch.autograd.Function):
    """[`FourBitFormat.linear`] by way of `unpack`, in the forward and in the backward pass."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, storage: FourBitFormat
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.storage = storage
        return F.linear(x, storage.unpack(packed, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor):
        (packed,) = ctx.saved_tensors
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_y @ ctx.storage.unpack(packed, grad_y.dtype) if needs_x else None
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if needs_bias else None
        return grad_x, None, grad_bias, None


@dataclass(frozen=True)
class DenseFormat:
    """A `[rows, columns]` matrix kept as it is, in `dtype`. Same interface as [`FourBitFormat`]."""

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32

    @property
    def is_lossless(self) -> bool:
        """Whether a float32 matrix comes back as it was."""
        return self.dtype == torch.float32

    def empty(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The zero matrix."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        """Round a floating matrix to `dtype`."""
        return matrix.to(self.dtype, copy=True)

    def unpack(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix in `dtype`."""
        return packed.to(dtype)

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ packed.T + bias` in the dtype of x."""
        return F.linear(x, packed.to(x.dtype), bias)


def storage_format(
    shape: tuple[int, int], quant_type: str | None, double_quant: bool, dtype: torch.dtype
) -> FourBitFormat | DenseFormat:
    """The format that a config asks for; `dtype` is that of a matrix which is not quantized."""
    # asked for in every forward pass; torch.compile traces through a cache, and warns of it
    build = _storage_format if torch.compiler.is_compiling() else _cached_storage_format
    return build(shape, quant_type, double_quant, dtype)


def _storage_format(
    shape: tuple[int, int], quant_type: str | None, double_quant: bool, dtype: torch.dtype
) -> FourBitFormat | DenseFormat:
    # bitsandbytes takes codes of one byte for those of a transposed matrix
    if quant_type is None or math.prod(shape) <= 2:
        return DenseFormat(shape, dtype)
    return FourBitFormat(shape, quant_type, double_quant)


_cached_storage_format = cache(_storage_format)


def undo_cpu_packing(weight: torch.nn.Parameter) -> None:
    """Bring a `Params4bit` back to the common layout, in place.

    In eval, on processors with AVX512-BF16, bitsandbytes repacks it into one that can neither be dequantized nor saved
    nor differentiated through. The absmax is rounded to bfloat16 on the way, for good.
    """
    state = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = unpack_from_cpu(weight.data, state)
    # its inverse (0.50.2), which `state_dict` calls too, leaves the absmax of weights that are not double-quantized
    # transposed and in bfloat16
    if state is not None and state.absmax.dim() == 2:
        state.absmax = state.absmax.T.reshape(-1).float()


def on_device(weight: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    """A copy of a frozen weight on a device, as it is stored, a `Params4bit` with its quantization state."""
    if weight.device == device:
        return weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return torch.nn.Parameter(weight.detach().to(device), requires_grad=False)
    undo_cpu_packing(weight)
    # `Params4bit.to` moves the state that it shares with its copies
    weight = copy.copy(weight)
    state = weight.quant_state = copy.copy(state)
    state.state2 = copy.copy(state.state2)
    return weight.to(device)
