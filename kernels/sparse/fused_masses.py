"""Estimated masses of pages in one pass over their clusters; compiled by Numba.

``BlockIndex.log_masses`` has the same in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, exp, log, prefetch

CHUNK = 32
"""Pages whose scores are held at a time: few enough for a cache, and the length of a vector or two."""
LINE = 64
"""Bytes of a cache line."""
NOTHING = F32(-1e30)
"""The log of no mass, finite so that only what is broken is not."""


@compiled
def log_masses(codes: Any, facts: Any, blocks: Any, query: Any, lengths: Any, logs: Any) -> None:
    """Write the logs of the estimated masses of ``blocks`` to ``logs``.

    ``codes`` int8 [B, H, S, D] and ``facts`` float32 [B, H, 3, S] are tables of a ``BlockIndex``; ``blocks``
    int64 [P], below B; ``query`` float32 [H, G, D]; ``lengths`` float32 [H], mean squares of its rows;
    ``logs`` float32 [H, G, P or more]. All but ``logs`` are contiguous.
    """
    pages = len(blocks)
    heads, group, _ = query.shape
    clusters = codes.shape[2]
    scores = np.empty((heads, group, clusters, CHUNK), np.float32)
    terms = np.empty((heads, 3, clusters, CHUNK), np.float32)
    for start in range(0, pages, CHUNK):
        count = min(CHUNK, pages - start)
        for i in range(count):
            block = blocks[start + i]
            following = blocks[min(start + i + 1, pages - 1)]
            for head in range(heads):
                # A few lines at a time: a processor waits for no more than it has room to remember.
                _bring(codes, following, head)
                _bring(facts, following, head)
                _products(codes, block, query, head, scores, i)
                for s in range(clusters):
                    for term in range(3):
                        terms[head, term, s, i] = facts[block, head, term, s]
        for head in range(heads):
            _add_spreads(terms, lengths[head], head, count)
            for g in range(group):
                _sum(scores, terms, head, g, count, logs[head, g, start : start + count])


@compiled
def _bring(table: Any, block: Any, head: Any) -> None:
    size = table.shape[2] * table.shape[3] * table.itemsize
    begin = (block * table.shape[1] + head) * size
    for at in range(begin, begin + size, LINE):
        prefetch(table, at)


@compiled
def _products(codes: Any, block: Any, query: Any, head: Any, scores: Any, i: Any) -> None:
    """Products of the codes of a block with a group's query heads, four at a time so that a code is widened
    once for all."""
    group, size = query.shape[1:]
    clusters = codes.shape[2]
    fours = group - group % 4
    for g in range(0, fours, 4):
        for s in range(clusters):
            first, second, third, fourth = F32(0), F32(0), F32(0), F32(0)
            for d in range(size):
                code = F32(codes[block, head, s, d])
                first += query[head, g, d] * code
                second += query[head, g + 1, d] * code
                third += query[head, g + 2, d] * code
                fourth += query[head, g + 3, d] * code
            scores[head, g, s, i] = first
            scores[head, g + 1, s, i] = second
            scores[head, g + 2, s, i] = third
            scores[head, g + 3, s, i] = fourth
    for g in range(fours, group):
        for s in range(clusters):
            product = F32(0)
            for d in range(size):
                product += query[head, g, d] * F32(codes[block, head, s, d])
            scores[head, g, s, i] = product


@compiled
def _add_spreads(terms: Any, length: Any, head: Any, count: Any) -> None:
    """Turn spreads into what a cluster has beside its mean's product (``clusters.log_masses``)."""
    for s in range(terms.shape[2]):
        for i in range(count):
            room = terms[head, 2, s, i]
            variance = length * terms[head, 1, s, i]
            wide = F32(2) * max(room, F32(0))
            free = room + F32(0.5) * variance
            above = free if variance < wide else np.sqrt(variance * wide)
            terms[head, 1, s, i] = NOTHING if room < 0 else above


@compiled
def _sum(scores: Any, terms: Any, head: Any, g: Any, count: Any, out: Any) -> None:
    """The log of the sum over clusters, of many pages at once."""
    clusters = scores.shape[2]
    peaks = np.empty(CHUNK, np.float32)
    sums = np.empty(CHUNK, np.float32)
    for i in range(count):
        peaks[i] = NOTHING
        sums[i] = F32(0)
    for s in range(clusters):
        for i in range(count):
            score = scores[head, g, s, i] * terms[head, 0, s, i] + terms[head, 1, s, i]
            scores[head, g, s, i] = score
            peaks[i] = score if score > peaks[i] else peaks[i]
    for s in range(clusters):
        for i in range(count):
            sums[i] += exp(scores[head, g, s, i] - peaks[i])
    for i in range(count):
        out[i] = peaks[i] + log(sums[i])
