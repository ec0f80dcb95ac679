"""Descriptors that a request takes on worn pools of SGLang: stock's ways to group pages, and FlowKV's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from penstock.benchmarks.flowkv_part import Finding, Options, Tell, percentile
from penstock.benchmarks.report import Cell, Claim
from penstock.connectors.runs import join_runs, runs_of

if TYPE_CHECKING:
    from penstock.benchmarks.sglang_pools import Sent

LAYERS = 32
SIDES = 2 * LAYERS
"""Buffers of stock's pool: K and V of each layer."""
NIXL, MOONCAKE, FLOWKV, APART = "stock NIXL", "stock Mooncake", "FlowKV", "FlowKV, layers apart"
Chunks = Sequence[tuple[list[int], list[int]]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to make descriptors of a request's chunks, on stock's pools or on FlowKV's."""

    name: str
    on_flowkv_s: bool
    count: Callable[[Chunks], int]

    def of(self, sent: Sent) -> int:
        """Descriptors of one request."""
        return self.count(sent.flowkv if self.on_flowkv_s else sent.stock)


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
        Way(NIXL, False, prepared),
        Way(MOONCAKE, False, grouped),
        Way("Mooncake's grouping on FlowKV's pages", True, grouped),
        Way("FlowKV on stock's pages", False, joint),
        Way(APART, True, lambda chunks: SIDES * joint(chunks)),
        Way(FLOWKV, True, joint),
    )


def measure(options: Options, tell: Tell) -> Finding:
    """Pools worn by generated requests, or by a trace's."""
    from penstock.benchmarks.sglang_pools import PAGE, hand_overs
    from penstock.simulation.traces import read_mooncake, replay

    trace = None if options.trace is None else read_mooncake(options.trace)
    seeds = range(options.seed, options.seed + (options.seeds or (1 if options.quick else 3)))
    warm, measured = (150, 100) if options.quick else (400, 400)
    all_sent: list[Sent] = []
    refusals = differences = 0
    for seed in seeds:
        tell(f"seed {seed}: {warm + measured} requests through SGLang's allocators")
        sent, pair = hand_overs(replay(trace, seed), warm, measured)
        all_sent += sent
        refusals += pair.prefill.refusals + pair.decode.refusals
        differences += pair.prefill.differences + pair.decode.differences
    counts = {way.name: [way.of(sent) for sent in all_sent] for way in ways()}
    return Finding(
        rows=[row_of(name, found, all_sent) for name, found in counts.items()],
        claims=claims_of(counts, differences),
        notes=[
            f"pages of {PAGE} tokens, {LAYERS} layers, {len(all_sent)} requests of seeds {list(seeds)}; "
            f"calls that both allocators refused: {refusals}"
        ],
    )


def row_of(name: str, counts: Sequence[int], sent: Sequence[Sent]) -> dict[str, Cell]:
    """What one way took."""
    return {
        "way": name,
        "pages": statistics.fmean(one.pages for one in sent),
        "chunks": statistics.fmean(len(one.stock) for one in sent),
        "descriptors": statistics.fmean(counts),
        "median": statistics.median(counts),
        "P99": percentile(counts, 0.99),
    }


def claims_of(counts: dict[str, list[int]], differences: int) -> list[Claim]:
    """What must hold."""
    total = {name: sum(found) for name, found in counts.items()}
    return [
        Claim.of("churned: stock NIXL's descriptors to FlowKV's", total[NIXL] / total[FLOWKV], ">=", 20),
        Claim.of("churned: Mooncake's descriptors to FlowKV's", total[MOONCAKE] / total[FLOWKV], ">=", 2),
        Claim.of(
            "churned: Mooncake's descriptors to FlowKV's, layers apart",
            total[MOONCAKE] / total[APART],
            ">=",
            2,
        ),
        Claim.of("calls refused that stock grants", differences, "==", 0),
    ]
