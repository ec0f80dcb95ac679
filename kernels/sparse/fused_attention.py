"""Attention over the blocks that rows of a table name, as vLLM's CPU cache holds them; compiled by Numba.

``packed_attention`` has the same in torch. A product reads the cache as it is, and brings numbers to float32
in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, NOTHING, log, widen
from penstock.kernels.sparse.products import LEAST_ROWS, add_paged_product
from penstock.kernels.sparse.running_softmax import TILE, weigh


@compiled
def attend(
    cache: Any,
    table: Any,
    lengths: Any,
    starts: Any,
    items: Any,
    query: Any,
    scale: Any,
    output: Any,
    lse: Any,
) -> None:
    """Write the attention of ``items`` to ``output``, its log-sum-exp to ``lse``.

    ``cache`` [R, 2 * D * N], contiguous, float32 or int16 with the bits of bfloat16, has keys [D, N] and then
    values [N, D] of a head of a block, N a multiple of ``TILE`` and D of ``LANES``. Row ``b`` has
    ``lengths[b]`` tokens in the blocks ``table[b]`` (int32 [B, P], numbers of rows of ``cache``), of which
    the last ones are queries, ``starts[b]`` to before ``starts[b + 1]`` of ``query`` [T, G, D], in the type
    of ``cache``: each sees what is before it. An item, int64 [I, 4], is a row, the first page of it to read,
    the one behind the last, and where its part of ``output`` float32 [M, G, D] and ``lse`` [M, G] begins.
    """
    _, group, size = query.shape
    room = 0
    for k in range(len(items)):
        b = items[k, 0]
        room = max(room, (starts[b + 1] - starts[b]) * group)
    room = (room + LEAST_ROWS - 1) // LEAST_ROWS * LEAST_ROWS
    rows = np.empty((room, size), np.float32)
    sums = np.empty((room, size), np.float32)
    scores = np.empty((room, TILE), np.float32)
    peaks, weights = np.empty(room, np.float32), np.empty(room, np.float32)
    seen = np.empty(room, np.int64)
    state = rows, sums, scores, peaks, weights, seen
    for k in range(len(items)):
        b, at = items[k, 0], items[k, 3]
        asked = query[starts[b] : starts[b + 1]]
        count = len(asked) * group
        padded = (count + LEAST_ROWS - 1) // LEAST_ROWS * LEAST_ROWS
        _gather(asked, scale, rows)
        rows[count:padded] = F32(0)
        peaks[:padded], weights[:padded], sums[:padded] = NOTHING, F32(0), F32(0)
        following = items[min(k + 1, len(items) - 1)]
        coming = table[following[0], following[1]]
        _read(cache, table[b], lengths[b], items[k], coming, len(asked), group, padded, state)
        for row in range(count):
            m, g = at + row // group, row % group
            whole = weights[row]
            lse[m, g] = peaks[row] + log(whole) if whole != 0 else F32(-np.inf)
            for d in range(size):
                output[m, g, d] = sums[row, d] / whole if whole != 0 else F32(0)


@compiled
def _gather(query: Any, scale: Any, rows: Any) -> None:
    group = query.shape[1]
    for t in range(len(query)):
        for g in range(group):
            for d in range(rows.shape[1]):
                rows[t * group + g, d] = F32(scale) * widen(query[t, g, d])


@compiled
def _read(
    cache: Any,
    blocks: Any,
    length: Any,
    item: Any,
    coming: Any,
    asked: Any,
    group: Any,
    padded: Any,
    state: Any,
) -> None:
    """Leave in ``state`` what ``asked`` queries of ``group`` heads find in the pages of an item; the block
    ``coming`` is read behind them."""
    rows, sums, scores, peaks, weights, seen = state
    size, width = rows.shape[1], cache.shape[1]
    tokens = width // (2 * size)
    flat = cache.reshape(-1)
    for page in range(item[1], item[2]):
        here = np.int64(blocks[page]) * width
        # What is read next is asked for: blocks lie anywhere, so that a processor cannot guess.
        there = np.int64(blocks[page + 1] if page + 1 < item[2] else coming) * width
        held = min(tokens, length - page * tokens)
        for start in range(0, held, TILE):
            more = start + TILE < held
            keys, values = here + start, here + width // 2 + start * size
            keys_then = keys + TILE if more else there
            values_then = values + TILE * size if more else there + width // 2
            scores[:padded] = F32(0)
            add_paged_product(scores, rows, flat, padded, size, keys, tokens, keys_then)
            left = length - page * tokens - start
            for row in range(padded):
                # The last query sees all that are left, the ones before it one less each.
                seen[row] = max(0, min(TILE, left - max(0, asked - 1 - row // group)))
            weigh(scores, seen[:padded], peaks, weights, sums)
            add_paged_product(sums, scores, flat, padded, min(TILE, held - start), values, size, values_then)
