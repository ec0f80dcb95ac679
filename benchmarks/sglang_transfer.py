"""The worn pages of SGLang's pools, moved by real NIXL between two processes' memory.

Stock's way is the one of its NIXL backend: every piece of both pools is prepared once, and a request is one
call that names ``2 * layers * pages`` of them. The agents and processes are those of the FlowKV bench.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence

from penstock.benchmarks.flowkv_memory import Shape
from penstock.benchmarks.flowkv_movers import LAYERS_APART, FlowKV, Job, Lists
from penstock.benchmarks.flowkv_part import Finding, Options, Tell, percentile
from penstock.benchmarks.flowkv_sides import Side, Took, both_sides
from penstock.benchmarks.flowkv_transfer import GIB, Timing
from penstock.benchmarks.paired_times import Share, median_share, tail_share
from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.sglang_pages import NIXL, SIDES
from penstock.benchmarks.sglang_pools import FLOWKV, STOCK, Chunks, serve
from penstock.connectors.runs import runs_of
from penstock.simulation.traces import read_mooncake, replay

LLAMA_8B = Shape("Llama 3.1 8B", layers=SIDES, page_bytes=32 << 10)
"""A page of 16 tokens: 32 KiB of K and as much of V in each layer."""
WAYS = (LAYERS_APART, FlowKV.name)
TURNS = 3
"""How often each way moves a request, the one and the other in turn: its median time counts."""
PREFILL_PAGES, DECODE_PAGES = 15 * 256 - 1, 9 * 256 - 1
"""A third of what the pages are counted in, since four pools are mapped at once. With the page of padding
they are odd multiples of 256: the layers of a pool laid over less memory do not lie on each other."""


def measure(options: Options, tell: Tell) -> Finding:
    """Hand-overs of worn pools, each moved by both, in turn."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    warm, measured = (150, 16) if options.quick else (400, 100)
    tell("SGLang's allocators are being worn")
    trace = None if options.trace is None else read_mooncake(options.trace)
    both = [
        serve(
            name,
            replay(trace, options.seed),
            warm,
            measured,
            prefill_pages=PREFILL_PAGES,
            decode_pages=DECODE_PAGES,
        ).hand_overs
        for name in (STOCK, FLOWKV)
    ]
    timings = {NIXL: Timing(), FlowKV.name: Timing()}
    tell("mapping two pools a side")
    # Page 0 is SGLang's padding.
    with both_sides(LLAMA_8B, PREFILL_PAGES + 1, DECODE_PAGES + 1, WAYS) as sides:
        for number, (stock, flowkv) in enumerate(zip(*both, strict=True)):
            tell(f"request {number + 1} of {len(both[0])}")
            took: dict[str, list[Took]] = {name: [] for name in timings}
            ways = _ways(stock, flowkv, sides)
            for turn in range(TURNS):
                for name, side, mover, job in ways[:: 1 if (number + turn) % 2 else -1]:
                    took[name].append(side.move(mover, job))
            for name, _side, _mover, job in ways:
                timing = timings[name]
                timing.wall_s.append(statistics.median(one.wall_s for one in took[name]))
                timing.cpu_s.append(statistics.median(one.cpu_s for one in took[name]))
                timing.calls.append(took[name][0].calls)
                timing.descriptors.append(took[name][0].descriptors)
                timing.num_bytes.append(job.num_blocks * LLAMA_8B.block_bytes)
    shares = shares_of(timings[NIXL], timings[FlowKV.name], options.seed)
    return Finding(
        rows=[row_of(name, timing) for name, timing in timings.items()],
        claims=claims_of(shares),
        notes=[
            f"{LLAMA_8B.name}, NIXL over UCX, UCX_TLS={os.environ.get('UCX_TLS', 'unset')}, DRAM",
            f"FlowKV to stock NIXL, the median of {TURNS} turns of each request, 95 % intervals: "
            + ", ".join(f"{name} {share}" for name, share in shares.items()),
        ],
    )


def _ways(stock: Chunks, flowkv: Chunks, sides: Sequence[Side]) -> list[tuple[str, Side, str, Job]]:
    by_mover = {mover: side for side in sides for mover in side.movers}
    return [
        (NIXL, by_mover[LAYERS_APART], LAYERS_APART, _whole(stock)),
        (FlowKV.name, by_mover[FlowKV.name], FlowKV.name, _whole(flowkv)),
    ]


def _whole(chunks: Chunks) -> Job:
    """All chunks as one transfer, which favours whoever has fewer descriptors to begin with the least."""
    source = [page for pages, _ in chunks for page in pages]
    target = [page for _, pages in chunks for page in pages]
    return Job(Lists(runs_of(source), runs_of(target)))


def row_of(name: str, timing: Timing) -> dict[str, Cell]:
    """What one way took."""
    return {
        "way": name,
        "requests": len(timing.wall_s),
        "MiB median": statistics.median(timing.num_bytes) / (1 << 20),
        "descriptors": statistics.fmean(timing.descriptors),
        "P50 ms": statistics.median(timing.wall_s) * 1e3,
        "P99 ms": percentile(timing.wall_s, 0.99) * 1e3,
        "CPU P50 ms": statistics.median(timing.cpu_s) * 1e3,
        "GiB/s": sum(timing.num_bytes) / sum(timing.wall_s) / GIB,
    }


def shares_of(stock: Timing, flowkv: Timing, seed: int) -> dict[str, Share]:
    """What FlowKV takes of stock's time on the same requests."""
    return {
        "time P50": median_share(flowkv.wall_s, stock.wall_s, seed),
        "time P99": tail_share(flowkv.wall_s, stock.wall_s, 0.99, seed),
        "processor P50": median_share(flowkv.cpu_s, stock.cpu_s, seed),
    }


def claims_of(shares: Mapping[str, Share]) -> list[Claim]:
    """What the times must show."""
    return [
        Claim.of(f"transfer: {name} to stock NIXL", shares[name].value, "<=", 0.5)
        for name in ("time P50", "time P99")
    ]
