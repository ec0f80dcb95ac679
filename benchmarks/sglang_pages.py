"""Descriptors that a request takes on worn pools of SGLang: stock's ways to group pages, and FlowKV's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from penstock.benchmarks.flowkv_part import Finding, Options, Tell, percentile
from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.sglang_pools import (
    DECODE_PAGES,
    FLOWKV,
    NO_SPARE,
    NO_SPARE_PAIRED,
    PAGE,
    PAIRED,
    PREFILL_PAGES,
    STOCK,
    Chunks,
    Served,
    serve,
)
from penstock.connectors.runs import join_runs, runs_of
from penstock.simulation.traces import read_mooncake, replay

LAYERS = 32
SIDES = 2 * LAYERS
"""Buffers of stock's pool: K and V of each layer."""
NIXL, MOONCAKE, APART = "stock NIXL", "stock Mooncake", "FlowKV, layers apart"
WORN_DECODE_PAGES = 3_000
"""A decode pool that is nearly always full."""
MOST_HITS_LOST = 0.02


@dataclass(frozen=True, slots=True)
class Way:
    """One way to make descriptors of a request's chunks, on pools with one of the allocators."""

    name: str
    allocator: str
    count: Callable[[Chunks], int]


def ways() -> tuple[Way, ...]:
    """Stock's two groupings by stock's own functions, and FlowKV's with either layout of its pool."""
    from sglang.srt.disaggregation.common.utils import group_concurrent_contiguous
    from sglang.srt.disaggregation.nixl.conn import repeat_indices_over_layers

    def prepared(chunks: Chunks) -> int:
        return sum(len(repeat_indices_over_layers(np.array(s, np.int32), SIDES, 1 << 20)) for s, _ in chunks)

    def grouped(chunks: Chunks) -> int:
        pairs = ((np.array(s, np.int32), np.array(t, np.int32)) for s, t in chunks)
        return SIDES * sum(len(group_concurrent_contiguous(s, t)[0]) for s, t in pairs)

    def joint(chunks: Chunks) -> int:
        return sum(len(join_runs(runs_of(s), runs_of(t))) for s, t in chunks)

    return (
        Way(NIXL, STOCK, prepared),
        Way(MOONCAKE, STOCK, grouped),
        Way("Mooncake's grouping on FlowKV's pages", FLOWKV, grouped),
        Way("FlowKV on stock's pages", STOCK, joint),
        Way(APART, FLOWKV, lambda chunks: SIDES * joint(chunks)),
        Way(NO_SPARE, NO_SPARE, joint),
        Way(NO_SPARE_PAIRED, NO_SPARE_PAIRED, joint),
        Way(PAIRED, PAIRED, joint),
        Way(FLOWKV, FLOWKV, joint),
    )


def measure(options: Options, tell: Tell) -> Finding:
    """Pools worn by generated requests, or by a trace's."""
    trace = None if options.trace is None else read_mooncake(options.trace)
    seeds = range(options.seed, options.seed + (options.seeds or (1 if options.quick else 3)))
    warm, measured = (150, 100) if options.quick else (300, 200)
    rows, claims, notes = [], [], []
    for decode_pages in (DECODE_PAGES,) if options.quick else (DECODE_PAGES, WORN_DECODE_PAGES):
        runs: dict[str, list[Served]] = {}
        for seed in seeds:
            for name in dict.fromkeys(way.allocator for way in ways()):
                tell(f"seed {seed}: {warm + measured} requests, {decode_pages} pages at decode, {name}")
                served = serve(name, replay(trace, seed), warm, measured, decode_pages=decode_pages)
                runs.setdefault(name, []).append(served)
        rows += [row_of(decode_pages, way, runs) for way in ways()]
        claims += claims_of(decode_pages, runs)
        active = statistics.fmean(share for served in runs[STOCK] for share in served.active)
        notes.append(f"decode pool of {decode_pages} pages: {active:.0%} of it active")
    notes.append(
        f"pages of {PAGE} tokens, {PREFILL_PAGES} at prefill, {LAYERS} layers; {measured} requests after "
        f"{warm}, of each of seeds {list(seeds)}"
    )
    return Finding(rows=rows, claims=claims, notes=notes)


def counts_of(way: Way, runs: Sequence[Served]) -> list[int]:
    """Descriptors of each request."""
    return [way.count(chunks) for served in runs for chunks in served.hand_overs]


def row_of(decode_pages: int, way: Way, runs: dict[str, list[Served]]) -> dict[str, Cell]:
    """What one way took."""
    mine = runs[way.allocator]
    counts = counts_of(way, mine)
    chunks = [chunks for served in mine for chunks in served.hand_overs]
    return {
        "decode pool": decode_pages,
        "way": way.name,
        "pages": statistics.fmean(sum(len(source) for source, _ in one) for one in chunks),
        "chunks": statistics.fmean(len(one) for one in chunks),
        "runs at prefill": statistics.fmean(sum(len(runs_of(s)) for s, _ in one) for one in chunks),
        "at decode": statistics.fmean(sum(len(runs_of(t)) for _, t in one) for one in chunks),
        "descriptors": statistics.fmean(counts),
        "median": statistics.median(counts),
        "P99": percentile(counts, 0.99),
        "cached": hit_rate(mine),
    }


def hit_rate(runs: Sequence[Served]) -> float:
    """Share of the prompts' tokens that came from the prefix cache."""
    return sum(served.cached_tokens for served in runs) / sum(served.prompt_tokens for served in runs)


def claims_of(decode_pages: int, runs: dict[str, list[Served]]) -> list[Claim]:
    """What must hold."""
    total = {way.name: sum(counts_of(way, runs[way.allocator])) for way in ways()}
    pool = f"decode pool of {decode_pages}"
    refused = sum(
        was and not now
        for stock, ours in zip(runs[STOCK], runs[FLOWKV], strict=True)
        for was, now in zip(stock.granted, ours.granted, strict=False)
    )
    return [
        Claim.of(f"{pool}: stock NIXL's descriptors to FlowKV's", total[NIXL] / total[FLOWKV], ">=", 20),
        Claim.of(f"{pool}: Mooncake's descriptors to FlowKV's", total[MOONCAKE] / total[FLOWKV], ">=", 2),
        Claim.of(
            f"{pool}: Mooncake's descriptors to FlowKV's, layers apart",
            total[MOONCAKE] / total[APART],
            ">=",
            2,
        ),
        Claim.of(
            f"{pool}: cached tokens to stock's",
            hit_rate(runs[FLOWKV]) / hit_rate(runs[STOCK]),
            ">=",
            1 - MOST_HITS_LOST,
        ),
        Claim.of(f"{pool}: calls refused that stock grants", refused, "==", 0),
    ]
