"""Exact masses of pages, from keys as a cache holds them; compiled by Numba.

``page_choice.exact_log_masses`` has the same in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, NOTHING, exp, log, widen


@compiled
def exact_log_masses(
    rows: Any,
    stride: Any,
    first: Any,
    places: Any,
    blocks: Any,
    pages: Any,
    query: Any,
    tail: Any,
    logs: Any,
) -> None:
    """Write the logs of the masses of ``pages`` to ``logs``.

    ``rows`` [R, 2 * D * N], contiguous, are keys and then values of a head of a block, float32 or int16 with
    the bits of bfloat16: head ``first + h`` of block ``b`` is row ``b * stride + first + h``, and ``places``
    says where ``unpack`` finds its keys. ``blocks`` int64 [P] are those of a request, ``pages`` int64 [K]
    numbers among them. ``query`` float32 [H, G, D]; ``logs`` float32 [H, G, P]. Of the last page of P, the
    first ``tail`` tokens count.
    """
    heads, group, size = query.shape
    tokens = rows.shape[1] // (2 * size)
    keys = np.empty((size, tokens), np.float32)
    scores = np.empty((group, tokens), np.float32)
    for head in range(heads):
        for k in range(len(pages)):
            page = pages[k]
            unpack(rows[blocks[page] * stride + first + head], places, keys)
            scores[:] = F32(0)
            for d in range(size):
                for g in range(group):
                    factor = query[head, g, d]
                    for n in range(tokens):
                        scores[g, n] += factor * keys[d, n]
            count = tail if page == len(blocks) - 1 else tokens
            for g in range(group):
                logs[head, g, page] = log_sum(scores[g, :count])


@compiled
def unpack(row: Any, places: Any, keys: Any) -> None:
    """Write the keys of a head of a block to ``keys`` float32 [D, N]; channel ``d`` of token ``n`` is at
    ``places[n * D + d]`` of ``row``, or, if there are no places, at ``d * N + n``."""
    size, tokens = keys.shape
    if len(places) == 0:
        for d in range(size):
            for n in range(tokens):
                keys[d, n] = widen(row[d * tokens + n])
    else:
        for n in range(tokens):
            for d in range(size):
                keys[d, n] = widen(row[places[n * size + d]])


@compiled
def log_sum(scores: Any) -> Any:
    """Of exponentials; not finite if a score is not."""
    peak = NOTHING
    for n in range(len(scores)):
        peak = scores[n] if scores[n] > peak else peak
    total = F32(0)
    for n in range(len(scores)):
        total += exp(scores[n] - peak)
    return peak + log(total)
