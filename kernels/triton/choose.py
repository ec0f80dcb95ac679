# ruff: noqa: ANN001, ANN202
"""Top-p over pages or tokens: from logs of masses to lists that a decode kernel reads, all on the device.

The rule is ``ranked`` of :mod:`penstock.kernels.sparse.groups`: one order for all query heads of a KV head,
by the sum of their shares, followed until each has its mass. Here a threshold on that sum is searched by
bisection, so nothing is sorted. What ties at the threshold is taken from the front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from penstock.kernels.sparse.top_p import LOG_RANGE, STEPS
from penstock.kernels.triton.launch import power
from penstock.kernels.triton.masses import first_recent

SHARES = 8192
"""Shares, of a unit in a query head, that a program holds at a time."""
LEAST_UNITS = 256
WARPS = 8


@dataclass(frozen=True, slots=True)
class ReadLists:
    """What each of ``R`` rows reads of ``U`` units (pages, or tokens).

    ``entries`` int32 [R, U]: numbers of units in the cache, in the order of positions, so that only the last
    can be partial; ``lengths`` int32 [R], tokens in them; ``taken`` uint8 [R, U] by position; ``left``
    float32 [R, G], the log of the estimated mass of what is not read. What lies beyond a length is
    undefined.
    """

    entries: torch.Tensor
    lengths: torch.Tensor
    taken: torch.Tensor
    left: torch.Tensor

    @classmethod
    def empty(cls, rows: int, group: int, units: int, device: torch.device) -> ReadLists:
        """Room for them."""
        return cls(
            torch.zeros(rows, units, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, units, dtype=torch.uint8, device=device),
            torch.zeros(rows, group, device=device),
        )


@triton.jit
def _logs(logs, row, first, count, sinks, tail, group, units, GROUP: tl.constexpr, UNITS: tl.constexpr):
    """Units from ``first`` on; their logs [GROUP, UNITS], -inf for none; which are read whatever they
    hold."""
    unit = first + tl.arange(0, UNITS)
    present = unit < count
    member = tl.arange(0, GROUP)
    place = logs + (row * group + member)[:, None] * units + unit[None, :]
    log = tl.load(place, mask=(member < group)[:, None] & present[None, :], other=float("-inf"))
    broken = (log != log) | (log == float("inf"))  # noqa: PLR0124
    kept = (unit < sinks) | (unit >= tail) | (tl.max(broken.to(tl.int32), 0) > 0)
    return unit, tl.where(broken, float("-inf"), log), present & kept


@triton.jit
def _total(logs, row, count, sinks, tail, group, units, GROUP: tl.constexpr, UNITS: tl.constexpr):
    """The log of the mass of all units [GROUP], and whether there is any."""
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    for first in range(0, count, UNITS):
        _, log, _ = _logs(logs, row, first, count, sinks, tail, group, units, GROUP, UNITS)
        higher = tl.maximum(peak, tl.max(log, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(log - base[:, None]), 1)
        peak = higher
    # The largest adds 1.
    return tl.where(total > 0, peak + tl.log(tl.maximum(total, 1.0)), 0.0), total > 0


@triton.jit
def _goal(logs, row, count, sinks, tail, group, units, lse, mass, GROUP: tl.constexpr, UNITS: tl.constexpr):
    """The share that free units are to add [GROUP], and the largest sum of shares of one of them."""
    kept_share = tl.zeros([GROUP], tl.float32)
    free_share = tl.zeros([GROUP], tl.float32)
    top = 0.0
    for first in range(0, count, UNITS):
        _, log, kept = _logs(logs, row, first, count, sinks, tail, group, units, GROUP, UNITS)
        share = tl.exp(log - lse[:, None])
        free = tl.where(kept[None, :], 0.0, share)
        kept_share += tl.sum(tl.where(kept[None, :], share, 0.0), 1)
        free_share += tl.sum(free, 1)
        top = tl.maximum(top, tl.max(tl.sum(free, 0), 0))
    # The rounding of a running sum must not ask for one unit more than there are.
    return tl.minimum(tl.maximum(mass - kept_share, 0.0), free_share) * (1 - 1e-6), top


@triton.jit
def _bisect(
    logs, row, count, sinks, tail, group, units, lse, goal, top,
    GROUP: tl.constexpr, UNITS: tl.constexpr, STEPS: tl.constexpr, LOG_RANGE: tl.constexpr,
):  # fmt: skip
    """Two thresholds: at the lower one every head has its goal, or everything is taken; at the higher one
    some head has not, and what each has there [GROUP]."""
    low = -LOG_RANGE
    high = 1e-3
    had = tl.zeros([GROUP], tl.float32)
    at_low = count
    at_high = 0
    step = 0
    # With one unit between the two, or none, more halvings change nothing.
    while (step < STEPS) & (at_low - at_high > 1):
        middle = (low + high) / 2
        threshold = top * tl.exp(middle)
        reached = tl.zeros([GROUP], tl.float32)
        above = 0
        for first in range(0, count, UNITS):
            _, log, kept = _logs(logs, row, first, count, sinks, tail, group, units, GROUP, UNITS)
            free = tl.where(kept[None, :], 0.0, tl.exp(log - lse[:, None]))
            over = tl.sum(free, 0) >= threshold
            reached += tl.sum(tl.where(over[None, :], free, 0.0), 1)
            above += tl.sum(over.to(tl.int32), 0)
        enough = tl.min((reached >= goal).to(tl.int32), 0) > 0
        had = tl.where(enough, had, reached)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        at_low = tl.where(enough, above, at_low)
        at_high = tl.where(enough, at_high, above)
        step += 1
    return tl.where(low == -LOG_RANGE, 0.0, top * tl.exp(low)), top * tl.exp(high), had


@triton.jit
def _taken(log, kept, present, lse, low, high, had, goal):
    """Units that are read, and what each head then has of those that tie."""
    share = tl.where(kept[None, :], 0.0, tl.exp(log - lse[:, None]))
    total = tl.sum(share, 0)
    surely = (total >= high) & (total > 0)
    tied = present & ~kept & ~surely & (total >= low) & (total > 0)
    tied_share = tl.where(tied[None, :], share, 0.0)
    before = had[:, None] + tl.cumsum(tied_share, 1) - tied_share
    short = tl.max((before < goal[:, None]).to(tl.int32), 0) > 0
    return present & (kept | surely | (tied & short)), had + tl.sum(tied_share, 1)


@triton.jit
def _choose(
    logs, others, lengths, counts, wanted, table, entries, out_lengths, taken, left,
    heads, group, units, pages, unit_tokens, block_tokens, sinks, recent, least_tokens, most_share,
    GROUP: tl.constexpr, UNITS: tl.constexpr, STEPS: tl.constexpr, LOG_RANGE: tl.constexpr,
    OTHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    request = row // heads
    member = tl.arange(0, GROUP)
    length = tl.load(lengths + request)
    count = tl.minimum((length + unit_tokens - 1) // unit_tokens, units)
    tail = first_recent(length, tl.load(counts + request), recent, unit_tokens)

    lse, known = _total(logs, row, count, sinks, tail, group, units, GROUP, UNITS)
    if OTHERS:
        other = tl.load(others + row * group + member, mask=member < group, other=float("-inf"))
        higher = tl.maximum(lse, other)
        lse = tl.where(known, higher + tl.log(tl.exp(lse - higher) + tl.exp(other - higher)), 0.0)
    mass = tl.load(wanted)
    goal, top = _goal(logs, row, count, sinks, tail, group, units, lse, mass, GROUP, UNITS)
    low, high, had = _bisect(
        logs, row, count, sinks, tail, group, units, lse, goal, top, GROUP, UNITS, STEPS, LOG_RANGE
    )

    chosen = 0
    running = had
    for first in range(0, count, UNITS):
        unit, log, kept = _logs(logs, row, first, count, sinks, tail, group, units, GROUP, UNITS)
        read, running = _taken(log, kept, unit < count, lse, low, high, running, goal)
        chosen += tl.sum(read.to(tl.int32), 0)
    whole = (length < least_tokens) | (chosen > most_share * count)

    written = 0
    last = 0
    running = had
    missing = tl.zeros([GROUP], tl.float32)
    for first in range(0, count, UNITS):
        unit, log, kept = _logs(logs, row, first, count, sinks, tail, group, units, GROUP, UNITS)
        read, running = _taken(log, kept, unit < count, lse, low, high, running, goal)
        read = tl.where(whole, unit < count, read)
        missing += tl.sum(tl.where(read[None, :], 0.0, tl.exp(log - lse[:, None])), 1)
        at = written + tl.cumsum(read.to(tl.int32), 0) - 1
        token = unit * unit_tokens
        block = tl.load(table + request * pages + token // block_tokens, mask=read, other=0)
        entry = block * (block_tokens // unit_tokens) + (token % block_tokens) // unit_tokens
        tl.store(entries + row * units + at, entry, mask=read)
        tl.store(taken + row * units + unit, read.to(tl.uint8), mask=unit < count)
        written += tl.sum(read.to(tl.int32), 0)
        last += tl.sum((read & (unit == count - 1)).to(tl.int32), 0)
    partial = tl.where(last > 0, count * unit_tokens - length, 0)
    tl.store(out_lengths + row, written * unit_tokens - partial)
    log_missing = tl.where(missing > 0, tl.log(tl.maximum(missing, 1e-38)) + lse, float("-inf"))
    tl.store(left + row * group + member, log_missing, mask=member < group)


def choose(
    logs: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    wanted: torch.Tensor,
    out: ReadLists,
    *,
    unit_tokens: int,
    block_tokens: int,
    sink_units: int,
    recent_tokens: int,
    least_tokens: int = 0,
    most_share: float = 1.0,
    others: torch.Tensor | None = None,
) -> None:
    """Write what each row reads into ``out``.

    ``logs`` float32 [B, H, G, U] of each unit of ``unit_tokens`` (that divide ``block_tokens``), -inf for
    none known and +inf or NaN for one that must be read; ``table`` int32 [B, P]; ``lengths`` int32 [B],
    tokens; ``counts`` int32 [B], units that an index has; ``wanted`` float32 [1], the share of mass.
    ``others`` float32 [B, H, G] is the log mass of what is not among the units. Always read are the first
    ``sink_units``, those with the last ``recent_tokens``, and those beyond ``counts``. All are, of contexts
    below ``least_tokens`` and where more than ``most_share`` would be.
    """
    requests, heads, group, units = logs.shape
    _choose[(requests * heads,)](
        logs, logs if others is None else others, lengths, counts, wanted, table,
        out.entries, out.lengths, out.taken, out.left,
        heads, group, units, table.shape[1], unit_tokens, block_tokens, sink_units, recent_tokens,
        least_tokens, most_share,
        GROUP=power(group), UNITS=min(power(units), max(LEAST_UNITS, SHARES // power(group))),
        STEPS=STEPS, LOG_RANGE=LOG_RANGE, OTHERS=others is not None, num_warps=WARPS,
    )  # fmt: skip
