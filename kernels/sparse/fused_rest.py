"""What stands for pages that are not read: the means of their values; compiled by Numba.

``BlockIndex.rest`` has the same in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, log, prefetch
from penstock.kernels.sparse.products import LANES, LEAST_ROWS, add_product, bring

CHUNK = 32
"""Pages whose means are brought to float32 at a time, and stay in the nearest cache."""
LINE = 64
"""Bytes of a cache line."""


@compiled
def estimate(
    values: Any, scales: Any, blocks: Any, shares: Any, read: Any, totals: Any, output: Any, lse: Any
) -> None:
    """Write the attention over ``blocks`` that are not ``read`` to ``output``, its log-sum-exp to ``lse``.

    ``values`` int8 [B, H, V] and ``scales`` float32 [B, H] are tables of a ``BlockIndex``; ``blocks`` int64
    [P]; ``shares`` float32 [H, G, P or more], ``read`` bool [H, P or more], ``totals`` float32 [H, G], logs
    of what the shares are of; ``output`` float32 [H, G, V] and ``lse`` float32 [H, G]. All are contiguous.
    No mass at all is 0 and -inf.
    """
    heads, group, width = output.shape
    padded = (group + LEAST_ROWS - 1) // LEAST_ROWS * LEAST_ROWS
    columns = (width + LANES - 1) // LANES * LANES
    every_scale = scales.reshape(-1)
    masses = np.zeros((heads, group), np.float32)
    sums = np.zeros((heads, padded, columns), np.float32)
    weights = np.zeros((padded, CHUNK), np.float32)
    means = np.zeros((CHUNK, columns), np.float32)
    factors, unread = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for first in range(0, len(blocks), CHUNK):
        count = min(CHUNK, len(blocks) - first)
        weights[:] = F32(0)
        for head in range(heads):
            for n in range(count):
                row = blocks[first + n] * heads + head
                # What is read is not multiplied either: zero times NaN is NaN.
                counts = not read[head, first + n]
                factors[n] = every_scale[row] if counts else F32(0)
                unread[n] = F32(1) if counts else F32(0)
                _bring(values, row, width, means, n)
                later = blocks[min(first + CHUNK + n, len(blocks) - 1)]
                _ask_for(values, scales, later * heads + head, width)
            for g in range(group):
                mass = F32(0)
                for n in range(count):
                    share = shares[head, g, first + n] * unread[n]
                    weights[g, n] = share * factors[n]
                    mass += share
                masses[head, g] += mass
            add_product(sums[head], weights, means, padded)
    for head in range(heads):
        for g in range(group):
            whole = masses[head, g]
            lse[head, g] = totals[head, g] + log(whole) if whole > 0 else F32(-np.inf)
            for d in range(width):
                output[head, g, d] = sums[head, g, d] / whole if whole > 0 else F32(0)


@compiled
def _bring(values: Any, row: Any, width: Any, means: Any, n: Any) -> None:
    """The means of ``row``, to row ``n`` of ``means``."""
    at, to = row * width, n * means.shape[1]
    whole = width // LANES * LANES
    for d in range(0, whole, LANES):
        bring(means, to + d, values, at + d)
    flat = values.reshape(-1)
    for d in range(whole, width):
        means[n, d] = F32(flat[at + d])


@compiled
def _ask_for(values: Any, scales: Any, row: Any, width: Any) -> None:
    for byte in range(0, width, LINE):
        prefetch(values, row * width + byte)
    prefetch(scales, row * scales.itemsize)
