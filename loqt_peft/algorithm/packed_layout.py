"""Where the parts of a matrix in 4 bits lie in its packed tensor; no library is imported, so that it is known at once."""

from __future__ import annotations

import math


BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
# bitsandbytes' CUDA kernels read vectors of 16 bytes
_ALIGNMENT = 16


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / _ALIGNMENT) * _ALIGNMENT


def packed_parts(shape: tuple[int, int], double_quant: bool) -> dict[str, tuple[int, int]]:
    """The parts of a packed matrix, in their order.

    Each is padded to 16 bytes: the codes `ceil(n / 2)`; then the absmax, float32 `[ceil(n / 64)]`, or, when
    double-quantized, uint8 `[ceil(n / 64)]`, float32 `[ceil(n / 16384)]` (its own absmax) and one float32 (its mean).

    Args:
        shape (`tuple[int, int]`): Of the matrix, with n entries.
        double_quant (`bool`): Whether the absmax is quantized to 8 bits too.

    Returns:
        `dict[str, tuple[int, int]]`: Offset and size in bytes, by name.
    """
    n = math.prod(shape)
    blocks = math.ceil(n / BLOCKSIZE)
    sizes = {"codes": math.ceil(n / 2)}
    if double_quant:
        sizes |= {"absmax": blocks, "nested_absmax": 4 * math.ceil(blocks / NESTED_BLOCKSIZE), "offset": 4}
    else:
        sizes |= {"absmax": 4 * blocks}
    parts, offset = {}, 0
    for name, size in sizes.items():
        parts[name] = (offset, size)
        offset += _aligned(size)
    return parts


def packed_bytes(shape: tuple[int, int], double_quant: bool) -> int:
    """Bytes of a packed matrix."""
    offset, size = list(packed_parts(shape, double_quant).values())[-1]
    return offset + _aligned(size)
