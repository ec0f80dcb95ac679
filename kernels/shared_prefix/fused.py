"""Attention of many rows over the same pages, each page read once; compiled by Numba.

``reference`` has the same in torch. Scores of a tile and what they add are products of small matrices
(``products``): all query heads of a KV head, of all requests that share the pages, are rows of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, NOTHING, log, prefetch, widen
from penstock.kernels.sparse.products import LANES, LEAST_ROWS, add_product, bring
from penstock.kernels.sparse.running_softmax import TILE, weigh

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
    seen = np.empty(room, np.int64)
    keys = np.empty((size, TILE), np.float32)
    values = np.empty((TILE, size), np.float32)
    scratch = rows, sums, scores, peaks, weights, seen, keys, values
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
    rows, sums, scores, peaks, weights, seen, keys, values = scratch
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
            seen[:padded] = number
            weigh(scores, seen[:padded], peaks, weights, sums)
            _widen_values(cache, here, start, number, values, ahead, there)
            add_product(sums, scores, values, padded)


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
