"""What all launches share: tile sizes and how exact a matrix product is."""

from __future__ import annotations

import os

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter on a CPU; decided when Triton is imported."""

SMALLEST_DOT = 16
"""Rows and columns that a matrix product needs at least."""


def tile(size: int) -> int:
    """The power of two that holds ``size`` and that a matrix product takes."""
    return max(SMALLEST_DOT, power(size))


def power(size: int) -> int:
    """The least power of two that is not below ``size``."""
    result: int = triton.next_power_of_2(size)
    return result


def products_in_fp32(*operands: torch.Tensor) -> bool:
    """Whether operands are made float32 before a product, whose error is then about float32's.

    16-bit operands are multiplied as they are, except in the interpreter, whose product of bfloat16 is wrong.
    """
    return INTERPRETED or any(one.dtype == torch.float32 for one in operands)


def warps(elements: int) -> int:
    """Warps of a program whose largest tile has so many ``elements``: 64 of them, or fewer, to a thread.

    With more, tiles do not fit in registers, and compiling takes minutes.
    """
    return max(4, min(16, power(elements) // (64 * 32)))
