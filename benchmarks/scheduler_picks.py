"""What a waiting order costs in processor time, by how many requests and clients wait.

A pick is ``peek``, ``pop`` and the charge of what was computed. The number that wait stays where it is: what
was picked is replaced by a new arrival. Hits are a dictionary's, so the figures are the order's own; an
engine's look-ups (``begin_step`` makes a bounded number of them) come on top. So does Python's garbage
collection, which is off here: what it costs depends on all else that the process holds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from penstock.benchmarks.flowkv_part import Finding, Options, Tell
from penstock.benchmarks.report import Cell, Claim
from penstock.schedulers.dlpm import DeficitOrder
from penstock.schedulers.fcfs import ArrivalOrder
from penstock.schedulers.lpm import PrefixOrder
from penstock.schedulers.vtc import CounterOrder
from penstock.schedulers.waiting import Job, WaitingOrder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCK_TOKENS = 16
PROMPT_BLOCKS = 128
SHARED_BLOCKS = 96
CHARGED_TOKENS = 2_048
REQUESTS_A_CLIENT = 10
PICKS_A_STEP = 4
SIZES, QUICK_SIZES = (1_000, 10_000, 100_000), (1_000, 10_000)
PICKS, QUICK_PICKS = 4_000, 1_000
ALLOWED_US = 50.0
"""A pick, whatever waits."""
POLICIES = ("dlpm", "lpm", "vtc", "fcfs")
OPERATIONS = ("add", "pick", "put_back", "remove", "step")


def measure(options: Options, tell: Tell) -> Finding:
    """A row a policy and size; the claim is the issue's bound on a mean pick at the largest size."""
    sizes = QUICK_SIZES if options.quick else SIZES
    rows: list[dict[str, Cell]] = []
    for policy in POLICIES:
        tell(policy)
        rows += time_picks(sizes, QUICK_PICKS if options.quick else PICKS, (policy,), options.seed)
    largest = [(row["policy"], row["us_per_pick"]) for row in rows if row["waiting"] == sizes[-1]]
    claims = [
        Claim.of(f"{policy}: us a pick, {sizes[-1]:,} waiting", float(mean), "<=", ALLOWED_US)
        for policy, mean in largest
        if isinstance(mean, float)
    ]
    return Finding(rows=rows, claims=claims, draw=partial(_draw, rows))


def _draw(rows: Sequence[dict[str, Any]], axes: Axes) -> None:
    for policy in POLICIES:
        found = [row for row in rows if row["policy"] == policy]
        axes.plot(
            [row["waiting"] for row in found], [row["us_per_pick"] for row in found], "o-", label=policy
        )
    axes.axhline(ALLOWED_US, color="0.5", linewidth=1, label="bound")
    axes.set_xscale("log")
    axes.set_xlabel("waiting requests, ten a client")
    axes.set_ylabel("us a pick, mean")
    axes.legend(fontsize="small")


def time_picks(
    sizes: Sequence[int] = SIZES,
    operations: int = PICKS,
    policies: Sequence[str] = POLICIES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row a policy and number of waiting requests, ten a client.

    Columns are microseconds of processor time: means of an operation, the 99th percentile of a pick, and the
    mean of a ``begin_step`` with its 64 look-ups in a dictionary.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return [_time(policy, size, operations, seed) for policy in policies for size in sizes]
    finally:
        if enabled:
            gc.enable()


class _Load:
    """Requests of many clients; each client's share a document, as do all clients' at its first blocks."""

    def __init__(self, waiting: int, seed: int) -> None:
        self.clients = max(1, waiting // REQUESTS_A_CLIENT)
        self.hit: dict[str, int] = {}
        self._random = random.Random(seed)
        self._number = 0

    def job(self) -> Job:
        self._number += 1
        client = self._random.randrange(self.clients)
        name = f"r{self._number}"
        self.hit[name] = BLOCK_TOKENS * self._random.choice((0, 1, SHARED_BLOCKS))
        shared = [hash(("document", client, block)) for block in range(SHARED_BLOCKS)]
        own = [hash((name, block)) for block in range(PROMPT_BLOCKS - SHARED_BLOCKS)]
        tokens = BLOCK_TOKENS * PROMPT_BLOCKS
        return Job(name, f"c{client}", tokens, self._number / 1000, ("system", *shared[1:], *own))

    def order(self, policy: str) -> WaitingOrder:
        match policy:
            case "dlpm":
                hit_tokens = self.hit.__getitem__
                return DeficitOrder(
                    clock=time.monotonic, hit_tokens=hit_tokens, newcomers_per_refill=self.clients
                )
            case "lpm":
                return PrefixOrder(clock=time.monotonic, hit_tokens=self.hit.__getitem__)
            case "vtc":
                return CounterOrder(clock=time.monotonic)
            case "fcfs":
                return ArrivalOrder()
        raise ValueError(f"policy is {policy!r}, allowed: {', '.join(POLICIES)}")


class _Times:
    """Processor times of one kind of operation, in nanoseconds."""

    def __init__(self) -> None:
        self.each: list[int] = []

    def of(self, operation: Callable[[], Any]) -> Any:
        start = time.thread_time_ns()
        result = operation()
        self.each.append(time.thread_time_ns() - start)
        return result

    @property
    def mean_us(self) -> float:
        return round(sum(self.each) / len(self.each) / 1e3, 2)

    @property
    def p99_us(self) -> float:
        return round(sorted(self.each)[int(0.99 * len(self.each))] / 1e3, 2)


def _time(policy: str, waiting: int, operations: int, seed: int) -> dict[str, Any]:
    load = _Load(waiting, seed)
    order = load.order(policy)
    for _ in range(waiting):
        order.add(load.job())
    order.begin_step()
    times = {name: _Times() for name in OPERATIONS}

    def pick() -> Job:
        order.peek()
        job = order.pop()
        order.charge_extend(job.client, CHARGED_TOKENS)
        return job

    rng = random.Random(seed)
    for number in range(operations):
        if number % PICKS_A_STEP == 0:
            times["step"].of(order.begin_step)
        job = times["pick"].of(pick)
        if number % 4 == 0:
            times["put_back"].of(partial(order.put_back, job, preempted=rng.random() < 0.5))
            times["remove"].of(partial(order.remove, job.request_id))
        times["add"].of(partial(order.add, load.job()))
    return {
        "case": "picks",
        "policy": policy,
        "waiting": waiting,
        "clients": load.clients,
        **{f"us_per_{name}": times[name].mean_us for name in OPERATIONS},
        "us_per_pick_p99": times["pick"].p99_us,
    }
