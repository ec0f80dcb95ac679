"""Pages by their masses, and lists of their blocks, each in one call; compiled by Numba.

``page_choice`` and ``head_rows`` have the same in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, exp

NARROW = 1 << 20
"""Steps of a float32 within which sums are sorted: an eighth of an octave, in which few pages are."""
ENOUGH = F32(1 - 1e-6)
"""Of a goal: the rounding of a sum must not ask for one page more."""


@compiled
def to_shares(logs: Any, kept: Any) -> None:
    """Turn ``logs`` of masses (float32 [H, G, P], contiguous) into shares, where they are.

    A mass that is not finite has none, and its page is added to those ``kept`` (bool [H, P]).
    """
    heads, group, pages = logs.shape
    for head in range(heads):
        for g in range(group):
            row = logs[head, g]
            peak = F32(-np.inf)
            for p in range(pages):
                if np.isfinite(row[p]):
                    peak = max(peak, row[p])
                else:
                    kept[head, p] = True
            total = F32(0)
            for p in range(pages):
                row[p] = exp(row[p] - peak) if np.isfinite(row[p]) else F32(0)
                total += row[p]
            for p in range(pages):
                row[p] = row[p] / total if total > 0 else F32(0)


@compiled
def choose_ranked(shares: Any, kept: Any, mass: Any, chosen: Any) -> None:
    """``page_choice.choose_pages`` by the rule ``ranked``, written to ``chosen`` (bool [H, P]).

    ``shares`` float32 [H, G, P], contiguous; ``kept`` bool [H, P]; ``mass`` float32 [H]. Where
    sums over a group are large enough is found by bisection of their bits; few are left to sort.
    """
    heads, group, pages = shares.shape
    sums = np.empty(pages, np.float32)
    goals = np.empty(group, np.float32)
    for head in range(heads):
        _sum_free(shares, kept, head, sums)
        wanted = False
        for g in range(group):
            goals[g] = _goal(shares, kept, head, g, mass[head])
            wanted = wanted or goals[g] > 0
        for p in range(pages):
            chosen[head, p] = kept[head, p]
        if not wanted:
            continue
        # Numbers that are not negative are in the order of their bits.
        bits = sums.view(np.int32)
        low, high = np.int32(0), np.int32(0x7F800000)
        while high - low > NARROW:
            middle = np.int32(low + (high - low) // 2)
            if _reached(shares, head, bits, middle, goals):
                low = middle
            else:
                high = middle
        _take(shares, head, sums, low, high, goals, chosen)


@compiled
def _sum_free(shares: Any, kept: Any, head: Any, sums: Any) -> None:
    for p in range(len(sums)):
        sums[p] = F32(0)
    for g in range(shares.shape[1]):
        for p in range(len(sums)):
            sums[p] += shares[head, g, p]
    for p in range(len(sums)):
        sums[p] = F32(0) if kept[head, p] else sums[p]


@compiled
def _goal(shares: Any, kept: Any, head: Any, g: Any, mass: Any) -> Any:
    """What a query head needs beside kept pages; nothing can have more than all."""
    had, free = F32(0), F32(0)
    for p in range(shares.shape[2]):
        share = shares[head, g, p]
        had += share if kept[head, p] else F32(0)
        free += F32(0) if kept[head, p] else share
    return ENOUGH * max(F32(0), min(mass - had, free))


@compiled
def _reached(shares: Any, head: Any, bits: Any, least: Any, goals: Any) -> Any:
    """Whether pages of sums of at least ``least`` have the goals; those that are kept have none."""
    for g in range(len(goals)):
        had = F32(0)
        for p in range(len(bits)):
            had += shares[head, g, p] if bits[p] >= least else F32(0)
        if had < goals[g]:
            return False
    return True


@compiled
def _take(shares: Any, head: Any, sums: Any, low: Any, high: Any, goals: Any, chosen: Any) -> None:
    """Choose pages of sums with bits from ``high``, and from ``low`` as many as are needed, largest first and
    then from the front."""
    bits = sums.view(np.int32)
    between = np.empty(len(sums), np.int64)
    count = 0
    short = goals.copy()
    for p in range(len(sums)):
        if bits[p] >= high:
            chosen[head, p] = True
            for g in range(len(goals)):
                short[g] -= shares[head, g, p]
        elif bits[p] >= low and bits[p] > 0:
            between[count] = p
            count += 1
    between = between[:count]
    for place in np.argsort(-sums[between], kind="mergesort"):
        if short.max() <= 0:
            return
        p = between[place]
        chosen[head, p] = True
        for g in range(len(goals)):
            short[g] -= shares[head, g, p]


@compiled
def list_blocks(
    blocks: Any, chosen: Any, stride: Any, block_tokens: Any, tail: Any, table: Any, lengths: Any
) -> Any:
    """Rows of ``head_rows``: the blocks of ``chosen`` pages (bool [H, P]), in order, to ``table`` (int32 [H,
    P or more], zeros) and their tokens to ``lengths`` (int32 [H]); returns how many the longest row has."""
    most = 0
    for head in range(len(chosen)):
        count = 0
        for p in range(len(blocks)):
            if chosen[head, p]:
                table[head, count] = blocks[p] * stride + head
                count += 1
        lengths[head] = (count - 1) * block_tokens + tail
        most = max(most, count)
    return most
