"""The block lists of churned pools, moved by real NIXL between two processes' memory.

Each request is moved by every setup in turn, the same number of bytes each time, so that whatever else
the machine does falls on all of them. Stock setups move the blocks that the stock pool handed out, FlowKV
those of its own pool. Beside the wall clock stands the CPU time of the reading process, which does not count
what others take: over shared memory that process copies every byte itself.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from penstock.benchmarks.flowkv_memory import Shape
from penstock.benchmarks.flowkv_movers import BLOCKS_WHOLE, PIECE_BY_PIECE, FlowKV, Job, OneDescriptor
from penstock.benchmarks.flowkv_part import Finding, Options, Tell, percentile
from penstock.benchmarks.flowkv_sides import Side, both_sides
from penstock.benchmarks.report import Cell, Claim
from penstock.connectors.runs import count_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from penstock.benchmarks.pool_joint import Transfer
    from penstock.benchmarks.pool_peers import Policy

T = TypeVar("T")

LLAMA_8B = Shape("Llama 3.1 8B", layers=32, page_bytes=64 << 10)
LLAMA_8B_RANK = Shape("Llama 3.1 8B, one of 8 ranks", layers=32, page_bytes=8 << 10)
"""With tensor parallelism each rank holds, and pulls, one of the eight KV heads."""
FRESH_REQUESTS = 12
"""So few that no block of a new pool is used twice."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Pair:
    """One request as the stock pools and as FlowKV's pools would move it: equal in size."""

    stock: Job
    flowkv: Job


@dataclass(slots=True)
class Timing:
    """What one setup took, request by request."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)

    def over(self, other: Timing, *, cpu: bool = False) -> float:
        """Median over the requests of this setup's time divided by the other's."""
        mine, its = (self.cpu_s, other.cpu_s) if cpu else (self.wall_s, other.wall_s)
        return statistics.median(a / b for a, b in zip(mine, its, strict=True))


Timings = dict[str, Timing]


def measure(options: Options, tell: Tell) -> Finding:
    """Fresh and churned pools with an 8B model's blocks; churned ones also with those of one of its ranks."""
    from penstock.benchmarks.pool_joint import DECODE_BLOCKS, PREFILL_BLOCKS

    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    churned, fresh = (3, 2) if options.quick else (100, FRESH_REQUESTS)
    found: dict[str, Timings] = {}
    for shape in (LLAMA_8B,) if options.quick else (LLAMA_8B, LLAMA_8B_RANK):
        cases = {"churned": pairs(options, churned, warm=60 if options.quick else 150)}
        if shape is LLAMA_8B:
            cases["fresh"] = pairs(options, fresh, warm=0)
        tell(f"{shape.name}: mapping two pools a side")
        with both_sides(shape, PREFILL_BLOCKS, DECODE_BLOCKS) as sides:
            for case, todo in cases.items():
                name = f"{case}, {shape.name}"
                found[name] = run(sides, todo, shape, name, tell)
    return Finding(
        rows=[row for case, timings in found.items() for row in rows_of(case, timings)],
        claims=[*claims_of(found), *counts_of(found)],
        notes=[f"NIXL over UCX, UCX_TLS={os.environ.get('UCX_TLS', 'unset')}, two processes a side, DRAM"],
        draw=lambda axes: draw(axes, found[f"churned, {LLAMA_8B.name}"]),
    )


def pairs(options: Options, count: int, *, warm: int) -> list[Pair]:
    """``count`` requests whose KV cache is moved between pools that ``warm`` requests went through before."""
    from penstock.benchmarks.pool_joint import hand_over
    from penstock.simulation.traces import read_mooncake, replay

    trace = None if options.trace is None else read_mooncake(options.trace)

    def lists(policy: Policy) -> list[Transfer]:
        return hand_over(policy, replay(trace, options.seed), options.seed, warm, count)[0]

    return match(lists("stock"), lists("flowkv"))


def match(stock: Sequence[Transfer], flowkv: Sequence[Transfer]) -> list[Pair]:
    """Pair transfers of equal size, first with first; what finds no partner is left out."""
    by_size: defaultdict[int, list[Job]] = defaultdict(list)
    for transfer in reversed(flowkv):
        if size := count_blocks(transfer.source):
            by_size[size].append(Job(transfer))
    jobs = [Job(transfer) for transfer in stock]
    return [Pair(job, by_size[job.num_blocks].pop()) for job in jobs if by_size[job.num_blocks]]


def run(sides: Sequence[Side], todo: Sequence[Pair], shape: Shape, case: str, tell: Tell) -> Timings:
    """Every mover on every request, the order turned by one from request to request."""
    movers = [(side, name) for side in sides for name in side.movers]
    timings: Timings = {name: Timing() for _, name in movers}
    for number, pair in enumerate(todo):
        tell(f"{case}: request {number + 1} of {len(todo)}")
        for side, name in turned(movers, number):
            job = pair.flowkv if name == FlowKV.name else pair.stock
            took = side.move(name, job)
            timing = timings[name]
            timing.wall_s.append(took.wall_s)
            timing.cpu_s.append(took.cpu_s)
            timing.calls.append(took.calls)
            timing.descriptors.append(took.descriptors)
            timing.num_bytes.append(job.num_blocks * shape.block_bytes)
    return timings


def turned(movers: Sequence[T], by: int) -> Iterator[T]:
    """The movers from another start."""
    return (movers[(by + i) % len(movers)] for i in range(len(movers)))


def rows_of(case: str, timings: Timings) -> list[dict[str, Cell]]:
    """One row a setup."""
    return [
        {
            "case": case,
            "setup": name,
            "requests": len(timing.wall_s),
            "MiB median": statistics.median(timing.num_bytes) / (1 << 20),
            "calls": statistics.fmean(timing.calls),
            "descriptors": statistics.fmean(timing.descriptors),
            "P50 ms": statistics.median(timing.wall_s) * 1e3,
            "P99 ms": percentile(timing.wall_s, 0.99) * 1e3,
            "CPU P50 ms": statistics.median(timing.cpu_s) * 1e3,
            "GiB/s": sum(timing.num_bytes) / sum(timing.wall_s) / GIB,
            "time to block-outermost": timing.over(timings[BLOCKS_WHOLE]),
            "CPU to block-outermost": timing.over(timings[BLOCKS_WHOLE], cpu=True),
        }
        for name, timing in timings.items()
    ]


def claims_of(found: dict[str, Timings]) -> list[Claim]:
    """What the times must show."""
    claims = []
    for case, timings in found.items():
        ours, best = timings[FlowKV.name], timings[BLOCKS_WHOLE]
        if not case.endswith(LLAMA_8B.name):
            continue
        if case.startswith("fresh"):
            claims.append(Claim.of(f"{case}: time P50 to best stock", ours.over(best), "<=", 1.05))
            continue
        p99 = percentile(ours.wall_s, 0.99) / percentile(best.wall_s, 0.99)
        single = timings[OneDescriptor.name].over(ours)
        baseline = 1 - ours.over(timings[PIECE_BY_PIECE])
        claims += [
            Claim.of(f"{case}: time P50 to best stock", ours.over(best), "<=", 0.5),
            Claim.of(f"{case}: time P99 to best stock", p99, "<=", 0.5),
            Claim.of(f"{case}: bandwidth to one descriptor's", single, ">=", 0.9),
            Claim.of(f"{case}: time saved to a call a block and layer", baseline, ">=", 0.96),
        ]
    return claims


def counts_of(found: dict[str, Timings]) -> list[Claim]:
    """What was asked of NIXL, whatever it took."""
    claims = []
    for case, timings in found.items():
        if case != f"churned, {LLAMA_8B.name}":
            continue
        descriptors = {name: sum(timing.descriptors) for name, timing in timings.items()}
        fewer = descriptors[BLOCKS_WHOLE] / descriptors[FlowKV.name]
        saved = 1 - sum(timings[FlowKV.name].calls) / sum(timings[PIECE_BY_PIECE].calls)
        claims += [
            Claim.of("churned: best stock's descriptors to FlowKV's", fewer, ">=", 20),
            Claim.of("churned: calls saved to a call a block and layer", saved, ">=", 0.96),
        ]
    return claims


def draw(axes: Axes, timings: Timings) -> None:
    """Time against bytes, a mark a request."""
    for name, timing in timings.items():
        mib = [num_bytes / (1 << 20) for num_bytes in timing.num_bytes]
        axes.plot(mib, [s * 1e3 for s in timing.wall_s], ".", label=name, alpha=0.6)
    axes.set(xlabel="MiB a request", ylabel="ms", xscale="log", yscale="log")
    axes.set_title("KV hand-over by NIXL, churned pools, Llama 3.1 8B blocks")
    axes.legend()
