"""Estimated masses of pages in one pass over their clusters; compiled by Numba.

``BlockIndex.log_masses`` has the same in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, NOTHING, exp, log, prefetch
from penstock.kernels.sparse.lanes import FOUR, WORDS, lane_scores, lane_sum, pack

CHUNK = 32
"""Pages whose scores are held at a time: few enough for a cache, and the length of a vector or two."""
LINE = 64
"""Bytes of a cache line."""
AHEAD = 2
"""Blocks from the one that is computed to the one that is brought into the cache."""


@compiled
def log_masses(codes: Any, facts: Any, blocks: Any, query: Any, lanes: Any, logs: Any) -> None:
    """Write the logs of the estimated masses of ``blocks`` to ``logs``.

    ``codes`` uint8 [B, H, D / CHANNELS, S, CHANNELS] and ``facts`` float32 [B, H, 3, S] are the tables of a
    ``BlockIndex``, S a multiple of ``lanes``; ``blocks`` int64 [P], below B; ``query`` float32 [H, G, D];
    ``logs`` float32 [H, G, P or more]. All but ``logs`` are contiguous.
    """
    heads, group, _ = query.shape
    fours = (group + FOUR - 1) // FOUR
    words = np.empty((heads, fours, codes.shape[2], WORDS), np.int32)
    offsets = np.empty((heads, fours, FOUR), np.int32)
    units = np.empty((heads, fours, FOUR), np.float32)
    lengths = np.empty(heads, np.float32)
    pack(query, words, offsets, units, lengths)
    rows = codes.shape[3] // lanes
    scores = np.empty((heads, fours, FOUR, CHUNK * rows, lanes), np.float32)
    peaks = np.empty((heads, fours, FOUR, lanes), np.float32)
    for start in range(0, len(blocks), CHUNK):
        peaks[:] = NOTHING
        count = min(CHUNK, len(blocks) - start)
        for i in range(count):
            block = blocks[start + i]
            coming = blocks[min(start + i + AHEAD, len(blocks) - 1)]
            for head in range(heads):
                # A few lines at a time: a processor waits for no more than it has room to remember.
                _bring(codes, coming * heads + head, codes[coming, head])
                _bring(facts, coming * heads + head, facts[coming, head])
                for four in range(fours):
                    for row in range(rows):
                        where = (block, head, four, row * lanes, i * rows + row)
                        lane_scores(codes, facts, words, offsets, units, lengths, scores, peaks, where)
        for head in range(heads):
            for g in range(group):
                out = logs[head, g, start : start + count]
                peak = peaks[head, g // FOUR, g % FOUR].max()
                _sum(scores[head, g // FOUR, g % FOUR], peak, out)


@compiled
def _bring(table: Any, place: Any, part: Any) -> None:
    """Have ``part`` of ``table``, the one with this number, read soon."""
    for at in range(place * part.nbytes, (place + 1) * part.nbytes, LINE):
        prefetch(table, at)


@compiled
def _sum(scores: Any, peak: Any, out: Any) -> None:
    """The logs of the sums over clusters, of many pages at once.

    Scores are taken from ``peak``, the largest of all these pages: what is 87 below it has no share.
    """
    flat = scores.reshape(-1)
    rows = len(scores) // CHUNK
    for place in range(len(out) * rows * scores.shape[1]):
        flat[place] = exp(flat[place] - peak)
    for i in range(len(out)):
        total = F32(0)
        for row in range(i * rows, (i + 1) * rows):
            total += lane_sum(scores[row])
        out[i] = total
    for i in range(len(out)):
        out[i] = peak + log(out[i])
