"""Churned pools: how many runs a request's KV cache breaks into, and what that costs in prefix-cache hits.

vLLM's real ``KVCacheManager`` lives through Mooncake-shaped traffic, full and evicting, under several orders
of handing out blocks. Runs count over the blocks that were handed out (not those a prefix hit brought),
growth included; a request's descriptors are its runs with a block-outermost layout, and layers times as many
with NIXL's default layout. Joint runs count over what a decode server pulls from a prefill server.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.benchmarks.pool_engine import Tally, make_manager, sequences
from penstock.benchmarks.pool_joint import DECODE_BLOCKS, PAIRS, hand_over
from penstock.benchmarks.pool_peers import Policy, equip
from penstock.benchmarks.pool_speed import time_operations
from penstock.benchmarks.report import Claim
from penstock.connectors.runs import join_runs
from penstock.simulation.traces import TraceRequest, read_mooncake, replay

LAYERS = 32
"""Layers of the model whose descriptors are counted (Llama 3.1 8B)."""
POLICIES: tuple[Policy, ...] = ("stock", "address-sorted", "best-fit", "flowkv")


@dataclass(frozen=True, slots=True)
class Case:
    """A pool of ``num_blocks``: ``warm`` requests fill it before any is counted.

    Steps of ``step_tokens`` set how many requests run at once, and so how much of the pool is active.
    """

    name: str
    num_blocks: int
    warm: int
    step_tokens: int
    median_target: float | None
    p99_target: float | None


CASES = (
    Case("25 % active", 26_000, 300, 1024, 2, 8),
    Case("70 % active", 9_000, 150, 1024, 2, 20),
    Case("90 % active", 9_000, 150, 1664, 4, 45),
    Case("requests always queue", 5_000, 150, 1024, None, None),
    Case("hits over 15 %", 90_000, 750, 1024, None, None),
)
QUICK_CASES = tuple(case for case in CASES if case.name != "requests always queue")
JOINT = {"joint, receiver 80 % active": DECODE_BLOCKS, "joint, receiver 93 % active": 5_000}
"""Blocks of the receiver's pool."""


@dataclass(slots=True)
class Pooled:
    """Tallies of one case and policy over all seeds."""

    runs: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    hit_tokens: int = 0
    active: list[float] = field(default_factory=list)
    wrongly_refused: int = 0

    def add(self, tally: Tally, runs: Iterable[int]) -> None:
        self.runs.extend(runs)
        self.prompt_tokens += tally.prompt_tokens
        self.hit_tokens += tally.hit_tokens
        self.active.extend(tally.active)
        self.wrongly_refused += tally.wrongly_refused

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens

    @property
    def mean(self) -> float:
        return statistics.fmean(self.runs)

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def p99(self) -> int:
        return sorted(self.runs)[int(len(self.runs) * 0.99)]

    def row(self, case: str, policy: str) -> dict[str, Any]:
        return {
            "case": case,
            "policy": policy,
            "requests": len(self.runs),
            "active": round(statistics.fmean(self.active), 3),
            "runs_mean": round(self.mean, 2),
            "runs_median": self.median,
            "runs_p99": self.p99,
            "descriptors_mean": round(self.mean, 2),
            "descriptors_mean_default_layout": round(self.mean * LAYERS, 1),
            "hit_rate": round(self.hit_rate, 4),
            "wrongly_refused": self.wrongly_refused,
        }


def churn(case: Case, policy: Policy, rows: Iterator[TraceRequest], seed: int, measured: int) -> Tally:
    """Run one pool and count ``measured`` requests after the pool is full."""
    engine = equip(make_manager(case.num_blocks), policy, case.step_tokens)
    source = sequences(rows, seed)
    for goal in (case.warm, measured):
        engine.tally = Tally()
        while len(engine.tally.finished) < goal:
            while len(engine.waiting) < 4:
                engine.submit(next(source))
            engine.step()
    return engine.tally


def run(
    *, quick: bool = False, trace: Path | None = None, seeds: Sequence[int] | None = None
) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Rows (one a case and policy, one a pool size for the speed) and the claims they prove or refute.

    ``trace`` is a Mooncake trace to replay, from a place that depends on the seed; without it each seed
    generates its own requests. ``quick`` takes one seed, fewer requests, cases and peers.
    """
    requests = None if trace is None else read_mooncake(trace)
    seeds = seeds or ((0,) if quick else (0, 1, 2))
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for case in CASES if not quick else QUICK_CASES:
        # The peers that ignore age search the whole pool at every call.
        policies = POLICIES if not quick or case.num_blocks < 50_000 else ("stock", "flowkv")
        results = {policy: pool_results(case, policy, requests, seeds, quick) for policy in policies}
        rows += [result.row(case.name, policy) for policy, result in results.items()]
        claims += case_claims(case, results)
    for name, blocks in list(JOINT.items())[: 1 if quick else None]:
        joint = {policy: joint_results(policy, blocks, requests, seeds, quick) for policy in PAIRS}
        rows += [result.row(name, policy) for policy, result in joint.items()]
        claims += joint_claims(name, joint)
    speed = time_operations((1_000, 10_000, 100_000) if quick else (1_000, 10_000, 100_000, 1_000_000))
    rows += speed
    claims += speed_claims(speed)
    return rows, claims


def pool_results(
    case: Case, policy: Policy, trace: list[TraceRequest] | None, seeds: Sequence[int], quick: bool
) -> Pooled:
    """One case under one policy, pooled over the seeds."""
    pooled = Pooled()
    for seed in seeds:
        tally = churn(case, policy, replay(trace, seed), seed, 200 if quick else 600)
        pooled.add(tally, (len(runs) for runs in tally.finished))
    return pooled


def joint_results(
    policy: Policy, decode_blocks: int, trace: list[TraceRequest] | None, seeds: Sequence[int], quick: bool
) -> Pooled:
    """Joint runs of what a decode pool pulls, pooled over the seeds."""
    pooled = Pooled()
    for seed in seeds:
        warm, measured = (100, 200) if quick else (150, 500)
        transfers, tally = hand_over(policy, replay(trace, seed), seed, warm, measured, decode_blocks)
        pooled.add(tally, (len(join_runs(t.source, t.target)) for t in transfers))
    return pooled


def case_claims(case: Case, results: dict[Policy, Pooled]) -> list[Claim]:
    """What one case promises against the stock order."""
    flowkv, stock = results["flowkv"], results["stock"]
    claims = [
        Claim.of(f"{case.name}: hit rate to stock's", flowkv.hit_rate / stock.hit_rate, ">=", 0.98),
        Claim.of(f"{case.name}: fewer descriptors than stock's best", stock.mean / flowkv.mean, ">=", 20),
        Claim.of(f"{case.name}: wrongly refused", flowkv.wrongly_refused, "==", 0),
    ]
    if case.median_target is not None and case.p99_target is not None:
        claims += [
            Claim.of(f"{case.name}: median runs", flowkv.median, "<=", case.median_target),
            Claim.of(f"{case.name}: P99 runs", flowkv.p99, "<=", case.p99_target),
        ]
    return claims


def joint_claims(name: str, results: dict[Policy, Pooled]) -> list[Claim]:
    """What a pair of pools promises."""
    flowkv, stock = results["flowkv"], results["stock"]
    return [
        Claim.of(f"{name}: median runs", flowkv.median, "<=", 3),
        Claim.of(f"{name}: P99 runs", flowkv.p99, "<=", 50),
        Claim.of(f"{name}: fewer descriptors than stock's best", stock.mean / flowkv.mean, ">=", 20),
        Claim.of(f"{name}: receiver's hit rate to stock's", flowkv.hit_rate / stock.hit_rate, ">=", 0.98),
        Claim.of(f"{name}: wrongly refused", flowkv.wrongly_refused, "==", 0),
    ]


def speed_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """An operation is one call of the free queue; flat means the largest pool to the smallest."""
    costs = [row["us_per_operation"] for row in rows if row["policy"] == "flowkv"]
    return [
        Claim.of("µs an operation (one queue call), worst pool size", max(costs), "<=", 30),
        Claim.of("µs an operation, largest pool to smallest", costs[-1] / costs[0], "<=", 2),
    ]
