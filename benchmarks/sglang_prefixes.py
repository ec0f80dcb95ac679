"""What the prefix cache gives: SGLang's scheduler and radix cache on stock's page allocator and FlowKV's.

The same requests, on a virtual clock and without a model, in caches too small for them: conversations of
several turns, and prompts that share prefixes as in Mooncake's trace.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from itertools import product
from typing import Any

import msgspec

from penstock.benchmarks.dlpm_cases import Case, cases
from penstock.benchmarks.flowkv_part import Finding, Options, Tell
from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.sglang_dlpm import VARIABLE, import_quietly
from penstock.benchmarks.sglang_pools import PAGE
from penstock.simulation.engine import Simulation, VirtualClock
from penstock.simulation.measures import hit_rate
from penstock.simulation.step_time import load_step_time

STOCK, FLOWKV = "stock", "FlowKV"
WORKLOADS = ("chat", "mooncake")
POLICY = "lpm"
"""SGLang's own order by cached prefix: what the cache holds decides who is served next."""
STEP_TIME = "opt-6.7b-a100"
MOST_APART = 0.02


class Run(msgspec.Struct, frozen=True):
    """One workload on one allocator, by name, so that it can be sent to another process."""

    workload: str
    allocator: str
    seed: int
    options: Options


class Hits(msgspec.Struct, frozen=True, kw_only=True):
    """What one run gave. ``decisions`` is a hash of the times and counts of all requests."""

    prompt_tokens: int
    cached_tokens: int
    hit_rate: float
    evicted_tokens: int
    decisions: str


Results = Sequence[tuple[Run, Hits]]


def measure(options: Options, tell: Tell) -> Finding:
    """Each workload on both allocators."""
    seeds = range(options.seed, options.seed + (options.seeds or (1 if options.quick else 3)))
    runs = [
        Run(workload, allocator, seed, options)
        for workload, seed, allocator in product(WORKLOADS, seeds, (STOCK, FLOWKV))
    ]
    import_quietly()
    workers = min(len(os.sched_getaffinity(0)), len(runs))
    results = []
    # A process of SGLang has one scheduler.
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        for run, hits in zip(runs, pool.imap(hits_of, runs), strict=True):
            results.append((run, hits))
            tell(f"{run.workload}, seed {run.seed}, {run.allocator}: {hits.hit_rate:.3f} from the cache")
    return Finding(
        rows=[row_of(run, hits, results) for run, hits in results],
        claims=claims_of(results),
        notes=[
            f"pages of {PAGE} tokens, SGLang's {POLICY}, step time {STEP_TIME}, seeds {list(seeds)}; where "
            "decisions are equal, every token of every request came at the same time"
        ],
    )


def hits_of(run: Run) -> Hits:
    """Run a workload to its end, in a process that SGLang has loaded no plugins in."""
    os.environ[VARIABLE] = ""
    from penstock.simulation.sglang_engine import EngineShape, SglangEngine

    case = case_of(run)
    if run.allocator == FLOWKV:
        use_flowkv_s_allocator()
    clock = VirtualClock()
    shape = EngineShape(
        kv_tokens=case.kv_tokens // PAGE * PAGE, schedule_policy=POLICY, more={"page_size": PAGE}
    )
    engine = SglangEngine(shape, clock=clock)
    assert type(engine.scheduler.token_to_kv_pool_allocator).__module__.startswith("penstock") == (
        run.allocator == FLOWKV
    )
    evicted = count_evictions(engine.scheduler.tree_cache)
    result = Simulation(engine, case.make(run.seed), load_step_time(STEP_TIME), clock).run()
    engine.idle()
    return Hits(
        prompt_tokens=sum(one.prompt_tokens for one in result.served),
        cached_tokens=sum(one.cached_tokens for one in result.served),
        hit_rate=hit_rate(result.served),
        evicted_tokens=sum(evicted),
        decisions=result.digest(),
    )


def case_of(run: Run) -> Case:
    """The workload and the size of its cache, of ``penstock bench dlpm``."""
    options = run.options
    return next(case for case in cases(quick=options.quick, trace=options.trace) if case.name == run.workload)


def use_flowkv_s_allocator() -> None:
    """Have SGLang make FlowKV's page allocator, as its hook does on the servers of a P/D pair."""
    from sglang.srt.platforms.interface import SRTPlatform

    from penstock.plugins.sglang.run_allocator import RunPagedAllocator

    SRTPlatform.get_paged_allocator_cls = lambda platform: RunPagedAllocator


def count_evictions(tree: Any) -> list[int]:
    """The tokens that a cache gives up, each time that it says so, as they come."""
    said, counts = tree.update_eviction_metrics, []

    def counted(tokens: int, start_time: float) -> None:
        counts.append(tokens)
        said(tokens, start_time)

    tree.update_eviction_metrics = counted
    return counts


def row_of(run: Run, hits: Hits, results: Results) -> dict[str, Cell]:
    """One run, and whether the other allocator's came to the same."""
    alike = {h.decisions for r, h in results if (r.workload, r.seed) == (run.workload, run.seed)}
    return {
        "workload": run.workload,
        "seed": run.seed,
        "allocator": run.allocator,
        "prompt tokens": hits.prompt_tokens,
        "from the cache": hits.cached_tokens,
        "hit rate": hits.hit_rate,
        "evicted": hits.evicted_tokens,
        "decisions equal": len(alike) == 1,
    }


def claims_of(results: Results) -> list[Claim]:
    """What must hold. Pressure is claimed too: a cache that never gives anything up proves nothing."""
    apart = []
    for run, hits in results:
        if run.allocator == FLOWKV:
            continue
        (other,) = [h for r, h in results if r == msgspec.structs.replace(run, allocator=FLOWKV)]
        apart.append(abs(other.cached_tokens / hits.cached_tokens - 1))
    pressed = min(hits.evicted_tokens / hits.prompt_tokens for _, hits in results)
    return [
        Claim.of("prefix hits apart from stock's, at most", max(apart), "<=", MOST_APART),
        Claim.of("evicted to prompt tokens, at least", pressed, ">=", 0.1),
    ]
