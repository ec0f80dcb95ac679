"""Pages by their masses, and lists of their blocks, each in one call; compiled by Numba.

``page_choice`` and ``head_rows`` have the same in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, exp, log

NARROW = 1 << 20
"""Steps of a float32 within which sums are sorted: an eighth of an octave, in which few pages are."""
INFINITY = np.int32(0x7F800000)
"""Its bits; those of numbers that are not negative are in the order of the numbers."""
LEAST_INTEGER, LARGEST_INTEGER = np.int32(-(2**31)), np.int32(2**31 - 1)
ENOUGH = F32(1 - 1e-6)
"""Of a goal: the rounding of a sum must not ask for one page more."""


@compiled
def to_shares(logs: Any, always: Any, kept: Any, totals: Any) -> None:
    """Turn ``logs`` of masses (float32 [H, G, P], contiguous) into shares, where they are.

    Written are the logs of the sums to ``totals`` float32 [H, G], and to ``kept`` (bool [H, P], false) which
    pages are those of ``always`` (int64) or have a mass that is not finite, and no share.
    """
    heads, group, pages = logs.shape
    for head in range(heads):
        for place in range(len(always)):
            kept[head, always[place]] = True
        for g in range(group):
            row = logs[head, g]
            peak, broken = _largest(row.view(np.int32))
            if broken:
                for p in range(pages):
                    if not np.isfinite(row[p]):
                        kept[head, p], row[p] = True, F32(-np.inf)
            total = F32(0)
            for p in range(pages):
                log_mass = row[p]
                row[p] = exp(log_mass - peak) if log_mass > F32(-np.inf) else F32(0)
                total += row[p]
            for p in range(pages):
                row[p] = row[p] / total if total > 0 else F32(0)
            totals[head, g] = peak + log(total) if total > 0 else F32(-np.inf)


@compiled
def _largest(bits: Any) -> Any:
    """The largest finite number with one of these ``bits``, 0 without any, and whether one is not finite.

    In integers, which are compared in vectors; flipped, those of negative numbers are in order too.
    """
    most, broken = LEAST_INTEGER, np.int32(0)
    for p in range(len(bits)):
        finite = (bits[p] & LARGEST_INTEGER) < INFINITY
        order = np.int32(bits[p] ^ ((bits[p] >> np.int32(31)) & LARGEST_INTEGER))
        order = order if finite else LEAST_INTEGER
        most = order if order > most else most
        broken |= np.int32(0) if finite else np.int32(1)
    if most == LEAST_INTEGER:
        return F32(0), broken != 0
    return np.int32(most ^ ((most >> np.int32(31)) & LARGEST_INTEGER)).view(np.float32), broken != 0


@compiled
def choose_massive(shares: Any, kept: Any, count: Any, chosen: Any) -> None:
    """``page_choice.most_massive``, written to ``chosen`` (bool [H, P]); the first ones of equal sums."""
    sums = np.empty(shares.shape[2], np.float32)
    bits = sums.view(np.int32)
    for head in range(len(shares)):
        _sum_free(shares, kept, head, sums)
        room = count
        for p in range(len(sums)):
            chosen[head, p] = kept[head, p]
            room -= 1 if kept[head, p] else 0
            bits[p] = np.int32(-1) if kept[head, p] else bits[p]
        if room <= 0:
            continue
        # As many as there is room for, or fewer, have at least ``high``; more have ``low``.
        low, high = np.int32(0), INFINITY
        while high - low > 1:
            middle = np.int32(low + (high - low) // 2)
            if _how_many(bits, middle) > room:
                low = middle
            else:
                high = middle
        room -= _how_many(bits, high)
        for p in range(len(sums)):
            if bits[p] >= high:
                chosen[head, p] = True
            elif bits[p] >= low and room > 0:
                chosen[head, p] = True
                room -= 1


@compiled
def _how_many(bits: Any, least: Any) -> Any:
    count = np.int32(0)
    for p in range(len(bits)):
        count += np.int32(1) if bits[p] >= least else np.int32(0)
    return count


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
        bits = sums.view(np.int32)
        low, high = np.int32(0), INFINITY
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
