"""Scalar functions for kernels that Numba compiles: written so that LLVM makes vectors of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from penstock.kernels.numba_support import compiled

F32 = np.float32
NOTHING = F32(-1e30)
"""The log of no mass: below every score, and finite so that only what is broken is not."""
LEAST_EXPONENT = F32(-87.0)
"""Below it, ``exp`` stays at what it has there: 1.6e-38."""
LOG2_E, LN2_HIGH, LN2_LOW = F32(1.44269504), F32(0.693359375), F32(-2.12194440e-4)


@compiled
def exp(x: Any) -> Any:
    """e ** x for float32 ``x`` up to 88, to 3e-7 of the value; NaN stays NaN.

    The usual reduction to |r| <= ln(2) / 2, where a Taylor series of seven terms is enough.
    """
    x = LEAST_EXPONENT if x < LEAST_EXPONENT else x
    k = np.floor(x * LOG2_E + F32(0.5))
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    series = F32(1 / 5040)
    series = series * r + F32(1 / 720)
    series = series * r + F32(1 / 120)
    series = series * r + F32(1 / 24)
    series = series * r + F32(1 / 6)
    series = series * r + F32(1 / 2)
    series = series * r + F32(1)
    series = series * r + F32(1)
    power = np.int32((np.int32(k) + np.int32(127)) << np.int32(23))
    return series * power.view(np.float32)


@compiled
def log(x: Any) -> Any:
    """The natural logarithm of a normal float32 ``x`` above 0, to 3e-7; NaN stays NaN.

    ``x`` is 2 ** k times m with m from sqrt(1/2) to sqrt(2), and log(m) is 2 atanh((m - 1) / (m + 1)).
    """
    bits = F32(x).view(np.int32)
    k = np.int32((bits - np.int32(0x3F3504F3)) >> np.int32(23))
    m = np.int32(bits - np.int32(k << np.int32(23))).view(np.float32)
    t = (m - F32(1)) / (m + F32(1))
    square = t * t
    series = F32(1 / 9)
    series = series * square + F32(1 / 7)
    series = series * square + F32(1 / 5)
    series = series * square + F32(1 / 3)
    series = series * square + F32(1)
    return F32(k) * F32(0.69314718) + F32(2) * t * series if x < np.inf else x


def ask_for(builder: Any, pointer: Any) -> None:
    """Have the line at ``pointer`` read soon, in code that ``builder`` builds."""
    word = ir.IntType(32)
    address = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    # To read, to keep in all caches, data.
    builder.call(function, [address, word(0), word(3), word(1)])


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_typing: Any, array: Any, offset: Any) -> Any:  # noqa: ARG001
    """``prefetch(array, offset)``: have the line ``offset`` bytes into a contiguous ``array`` read soon.

    Blocks of a cache lie anywhere, so that a processor cannot guess the next; told of it, half of the time is
    saved.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        ask_for(builder, builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def widen(x: Any) -> Any:
    """A float32 from one, or from the int16 with the bits of a bfloat16."""
    raise NotImplementedError("for compiled code alone")


@overload(widen, inline="always")  # type: ignore[untyped-decorator]
def _widen(x: Any) -> Any:
    def of_bits(x: Any) -> Any:
        return np.int32(np.int32(x) << np.int32(16)).view(np.float32)

    def as_is(x: Any) -> Any:
        return np.float32(x)

    return of_bits if isinstance(x, types.Integer) else as_is
