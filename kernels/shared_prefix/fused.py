"""Attention of many rows over the same pages, each page read once; compiled by Numba.

``reference`` has the same in torch. Scores of a tile and what they add are products of small matrices
(``products``): all query heads of a KV head, of all requests that share the pages, are rows of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from penstock.kernels.numba_support import compiled
from penstock.kernels.shared_prefix.products import (
    COLUMNS,
    LANES,
    LEAST_ROWS,
    add_product,
    bring,
    peak_of,
    sum_of,
)
from penstock.kernels.sparse.compiled_math import F32, NOTHING, exp, log, prefetch, widen

TILE = 32
"""Tokens whose keys and values are brought to float32 at a time, and stay in the nearest cache."""
LINE = 64
"""Bytes that a processor reads at once."""


@compiled
def attend(
    cache: Any,
    stride: Any,
    table: Any,
    items: Any,
    members: Any,
    work: Any,
    query: Any,
    group: Any,
    scale: Any,
    output: Any,
    lse: Any,
) -> None:
    """Write the attention that the ``work`` is of to ``output``, and its log-sum-exp to ``lse``.

    ``cache`` [R, 2 * D * N], contiguous, float32 or int16 with the bits of bfloat16, has the keys [D, N] and
    the values [N, D] of a head of a block: head ``h`` of block ``b`` is row ``b * stride + h``. ``table``
    int32 [B, P], ``items`` int64 [I, 6] and ``members`` int64 [M] are those of a ``Layout``. ``work`` int64
    [W, 2]: an item, and a KV head. ``query`` [B, H * G, D] is of the type of the cache, contiguous, and
    ``group`` is G. The attention of member ``m`` goes to ``output`` float32 [M, H * G, D] and ``lse`` float32
    [M, H * G]; no token at all is 0 and -inf.
    """
    size = query.shape[2]
    most = 1
    for k in range(len(work)):
        most = max(most, (items[work[k, 0], 5] - items[work[k, 0], 4]) * group)
    room = (most + LEAST_ROWS - 1) // LEAST_ROWS * LEAST_ROWS
    rows = np.empty((room, size), np.float32)
    sums = np.empty((room, size), np.float32)
    scores = np.empty((room, TILE), np.float32)
    peaks = np.empty(room, np.float32)
    weights = np.empty(room, np.float32)
    keys = np.empty((size, TILE), np.float32)
    values = np.empty((TILE, size), np.float32)
    scratch = rows, sums, scores, peaks, weights, keys, values
    for k in range(len(work)):
        item, head = work[k]
        begin, end = items[item, 4], items[item, 5]
        count = (end - begin) * group
        padded = (count + LEAST_ROWS - 1) // LEAST_ROWS * LEAST_ROWS
        _gather(query, members[begin:end], head, group, scale, rows)
        rows[count:padded] = F32(0)
        _read(cache, stride, table, items[item], head, padded, scratch)
        for row in range(count):
            m, q = begin + row // group, head * group + row % group
            whole = weights[row]
            lse[m, q] = peaks[row] + log(whole) if whole != 0 else F32(-np.inf)
            for d in range(size):
                output[m, q, d] = sums[row, d] / whole if whole != 0 else F32(0)


@compiled
def _read(cache: Any, stride: Any, table: Any, item: Any, head: Any, padded: Any, scratch: Any) -> None:
    """Leave the sums of an item for ``padded`` rows, their weights and largest scores in ``scratch``."""
    rows, sums, scores, peaks, weights, keys, values = scratch
    request, first, last, tail = item[0], item[1], item[2], item[3]
    tokens = cache.shape[1] // (2 * rows.shape[1])
    sums[:padded] = F32(0)
    weights[:padded] = F32(0)
    peaks[:padded] = NOTHING
    for page in range(first, last):
        held = tail if page == last - 1 else tokens
        here = table[request, page] * stride + head
        following = table[request, page + 1] * stride + head if page < last - 1 else here
        for start in range(0, held, TILE):
            number = min(TILE, held - start)
            ahead, there = (here, start + TILE) if start + TILE < held else (following, 0)
            _widen_keys(cache, here, start, number, keys, ahead, there)
            scores[:padded] = F32(0)
            add_product(scores, rows, keys, padded)
            _weigh(scores, number, padded, peaks, weights, sums)
            _widen_values(cache, here, start, number, values, ahead, there)
            add_product(sums, scores, values, padded)


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


@compiled
def _gather(query: Any, requests: Any, head: Any, group: Any, scale: Any, rows: Any) -> None:
    for m in range(len(requests)):
        for g in range(group):
            for d in range(rows.shape[1]):
                rows[m * group + g, d] = F32(scale) * widen(query[requests[m], head * group + g, d])


@compiled
def _widen_keys(cache: Any, here: Any, start: Any, number: Any, keys: Any, ahead: Any, there: Any) -> None:
    """Keys [D, N] of row ``here`` from token ``start`` on, zero beyond ``number``; those of ``ahead`` from
    ``there`` on are asked for."""
    size = keys.shape[0]
    width = cache.shape[1]
    tokens = width // (2 * size)
    at, following = here * width + start, ahead * width + there
    for d in range(size):
        for byte in range(0, TILE * cache.itemsize, LINE):
            prefetch(cache, following * cache.itemsize + byte)
        if number == TILE:
            for n in range(0, TILE, LANES):
                bring(keys, d * TILE + n, cache, at + n)
        else:
            for n in range(TILE):
                keys[d, n] = widen(cache[here, d * tokens + start + n]) if n < number else F32(0)
        at += tokens
        following += tokens


@compiled
def _widen_values(
    cache: Any, here: Any, start: Any, number: Any, values: Any, ahead: Any, there: Any
) -> None:
    """As ``_widen_keys``, of values [N, D]."""
    size = values.shape[1]
    width = cache.shape[1]
    at = here * width + width // 2 + start * size
    following = ahead * width + width // 2 + there * size
    for byte in range(0, TILE * size * cache.itemsize, LINE):
        prefetch(cache, following * cache.itemsize + byte)
    for n in range(0, number * size, LANES):
        bring(values, n, cache, at + n)
    values[number:] = F32(0)


@compiled
def _weigh(scores: Any, number: Any, rows: Any, peaks: Any, weights: Any, sums: Any) -> None:
    """Turn scores of a tile into weights beside the largest score so far, by which what was added before is
    made smaller; those beyond ``number`` are 0."""
    if number < TILE:
        scores[:rows, number:] = NOTHING
    for r in range(rows):
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
    for r in range(rows):
        peak = peaks[r]
        for n in range(TILE):
            scores[r, n] = exp(scores[r, n] - peak)
    if number < TILE:
        scores[:rows, number:] = F32(0)
    for r in range(rows):
        for first in range(0, TILE, COLUMNS):
            weights[r] += sum_of(scores, r * TILE + first)


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
