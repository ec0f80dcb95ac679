"""A softmax over tokens that come a tile at a time, or in parts, for kernels that Numba compiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, NOTHING, exp
from penstock.kernels.sparse.products import COLUMNS, peak_of, sum_of

TILE = 32
"""Tokens whose scores are turned into weights at a time."""


@compiled
def weigh(scores: Any, seen: Any, peaks: Any, weights: Any, sums: Any) -> None:
    """Turn ``scores`` float32 [R or more, TILE] into weights beside the largest score so far.

    Row ``r`` counts the first ``seen[r]`` tokens, ``seen`` int64 [R], and has ``peaks[r]``, the largest
    score, ``weights[r]``, the sum of weights, and ``sums[r]``, what was added; the latter two are made
    smaller where the peak grows. Weights of tokens that are not seen are 0.
    """
    for r in range(len(seen)):
        if seen[r] < TILE:
            scores[r, seen[r] :] = NOTHING
        peak = peaks[r]
        for first in range(0, TILE, COLUMNS):
            highest = peak_of(scores, r * TILE + first)
            peak = highest if highest > peak else peak
        if peak > peaks[r]:
            smaller = exp(peaks[r] - peak)
            weights[r] *= smaller
            for d in range(sums.shape[1]):
                sums[r, d] *= smaller
            peaks[r] = peak
    for r in range(len(seen)):
        peak = peaks[r]
        for n in range(TILE):
            scores[r, n] = exp(scores[r, n] - peak)
    for r in range(len(seen)):
        if seen[r] < TILE:
            scores[r, seen[r] :] = F32(0)
        for first in range(0, TILE, COLUMNS):
            weights[r] += sum_of(scores, r * TILE + first)


@compiled
def merge(parts: Any, lse: Any, starts: Any, slots: Any, first: Any, last: Any, output: Any) -> None:
    """Write the attention of requests from ``first`` to before ``last`` to ``output`` [B, Q, D], float32 or
    int16 for the bits of bfloat16.

    Request ``b`` has the parts ``slots[starts[b]:starts[b + 1]]`` of ``parts`` float32 [M, Q, D] and ``lse``
    float32 [M, Q].
    """
    heads, size = output.shape[1:]
    row = np.empty(size, np.float32)
    for b in range(first, last):
        own = slots[starts[b] : starts[b + 1]]
        for q in range(heads):
            peak, whole = NOTHING, F32(0)
            for k in range(len(own)):
                peak = lse[own[k], q] if lse[own[k], q] > peak else peak
            row[:] = F32(0)
            for k in range(len(own)):
                weight = exp(lse[own[k], q] - peak)
                whole += weight
                for d in range(size):
                    row[d] += weight * parts[own[k], q, d]
            for d in range(size):
                output[b, q, d] = narrow(output, row[d] / whole)


def narrow(like: Any, x: Any) -> Any:
    """``x`` as an element of the array ``like``: float32, or the int16 with the bits of the nearest
    bfloat16."""
    raise NotImplementedError("for compiled code alone")


@overload(narrow, inline="always")  # type: ignore[untyped-decorator]
def _narrow(like: Any, x: Any) -> Any:  # noqa: ARG001
    def to_bits(like: Any, x: Any) -> Any:  # noqa: ARG001
        if np.isnan(x):
            return np.int16(0x7FC0)
        bits = F32(x).view(np.int32)
        even = np.int32(bits >> np.int32(16)) & np.int32(1)
        return np.int16(np.int32(bits + np.int32(0x7FFF) + even) >> np.int32(16))

    def as_is(like: Any, x: Any) -> Any:  # noqa: ARG001
        return F32(x)

    return to_bits if isinstance(like.dtype, types.Integer) else as_is
