"""What a policy adds to a step of vLLM's scheduler, in processor time, beside vLLM's own in the same run.

All schedulers step in turn under the same load: 256 requests run, 10,000 wait. A step is ``schedule`` and
``update_from_output``, statistics included. Steps are compared by kind: those that admit nobody, and those
that admit one request. Python's garbage collection is off.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from penstock.benchmarks.flowkv_part import Finding, Options, Tell, percentile
from penstock.benchmarks.report import Cell, Claim

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from penstock.benchmarks.scheduler_engine import Load, Stepped

STOCK = "stock"
ADAPTER = "adapter, order of arrival"
POLICIES = ("dlpm", "vtc", "lpm")
SIDES = (STOCK, ADAPTER, *POLICIES)
CLIENTS, QUICK_CLIENTS = (1, 100, 1_000), (100, 1_000)
WARM_UP_STEPS = 60
STEPS, QUICK_STEPS = 1_000, 150
ALLOWED_MS = 0.3
"""3 % of a step of 10 ms."""


class Times:
    """Processor times of the steps of one scheduler, in milliseconds, by requests that were admitted."""

    def __init__(self) -> None:
        self.by_admissions: dict[int, list[float]] = {}
        self.arrivals: list[float] = []
        self.admitted_tokens = 0
        self.cached_tokens = 0

    def note(self, admitted: Sequence[Any], spent_ms: float) -> None:
        """A step that admitted these requests took so long."""
        self.by_admissions.setdefault(len(admitted), []).append(spent_ms)
        self.admitted_tokens += sum(len(new.prompt_token_ids) for new in admitted)
        self.cached_tokens += sum(new.num_computed_tokens for new in admitted)


def measure(options: Options, tell: Tell) -> Finding:
    """Run the load with each number of clients; a row for each number and scheduler."""
    from penstock.benchmarks.scheduler_engine import Load

    rows: list[dict[str, Cell]] = []
    for clients in QUICK_CLIENTS if options.quick else CLIENTS:
        tell(f"{clients:,} clients")
        times = compare(Load(clients=clients, seed=options.seed), QUICK_STEPS if options.quick else STEPS)
        rows += [row_of(side, clients, times) for side in SIDES]
    return Finding(rows=rows, claims=claims_of(rows), draw=partial(draw, rows))


def compare(load: Load, steps: int, sides: Sequence[str] = SIDES) -> dict[str, Times]:
    """Step a scheduler of each of ``sides`` in turn, ``steps`` times after a warm-up."""
    times = {side: Times() for side in sides}
    with quiet():
        engines = {side: stepped(side, load) for side in sides}
        for engine in engines.values():
            for _ in range(WARM_UP_STEPS):
                step(engine, Times())
        for _ in range(steps):
            for side, engine in engines.items():
                step(engine, times[side])
    return times


@contextmanager
def quiet() -> Iterator[None]:
    """Without garbage collection, and without the log lines that vLLM writes as it configures an engine."""
    enabled, disabled_below = gc.isenabled(), logging.root.manager.disable
    gc.disable()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled_below)
        if enabled:
            gc.enable()


def stepped(side: str, load: Load) -> Stepped:
    """The scheduler that a side stands for, under load."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from penstock.benchmarks.scheduler_engine import Stepped
    from penstock.plugins.vllm.request_scheduler import SyncRequestScheduler
    from penstock.schedulers.fcfs import ArrivalOrder

    if side == STOCK:
        return Stepped(load, Scheduler, None)
    if side == ADAPTER:
        by_arrival = partial(SyncRequestScheduler, order_of=lambda *_: ArrivalOrder(), front_end_exports=True)
        return Stepped(load, by_arrival, {})
    return Stepped(load, partial(SyncRequestScheduler, front_end_exports=True), {"policy": side})


def step(engine: Stepped, times: Times) -> None:
    """One step, and an arrival for each request that ended."""
    scheduler = engine.scheduler
    before = len(scheduler.requests)
    start = time.thread_time_ns()
    output = scheduler.schedule()
    scheduled = time.thread_time_ns()
    sampled = engine.sampled(output)
    received = time.thread_time_ns()
    scheduler.update_from_output(output, sampled)
    end = time.thread_time_ns()
    times.note(output.scheduled_new_reqs, (scheduled - start + end - received) / 1e6)
    for _ in range(before - len(scheduler.requests)):
        request = engine.next_request()
        start = time.thread_time_ns()
        scheduler.add_request(request)
        times.arrivals.append((time.thread_time_ns() - start) / 1e3)


def row_of(side: str, clients: int, times: dict[str, Times]) -> dict[str, Cell]:
    """The medians and the 99th percentiles of one scheduler, and what its medians exceed stock's by."""
    row: dict[str, Cell] = {"scheduler": side, "clients": clients}
    for kind, admitted in (("decode", 0), ("admission", 1)):
        spent = times[side].by_admissions.get(admitted, [])
        stock = times[STOCK].by_admissions.get(admitted, [])
        if not spent or not stock:
            continue
        row[f"{kind}: steps"] = len(spent)
        row[f"{kind}: ms"] = round(median(spent), 3)
        row[f"{kind}: P99 ms"] = round(percentile(spent, 0.99), 3)
        row[f"{kind}: extra ms"] = round(median(spent) - median(stock), 3)
        row[f"{kind}: extra P99 ms"] = round(percentile(spent, 0.99) - percentile(stock, 0.99), 3)
    if times[side].arrivals:
        row["arrival us"] = round(median(times[side].arrivals), 1)
    if times[side].admitted_tokens:
        row["cached %"] = round(100 * times[side].cached_tokens / times[side].admitted_tokens, 1)
    return row


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """That no policy adds more than is allowed, however many clients there are."""
    claims = []
    for kind, text in (("decode", "that admits nobody"), ("admission", "that admits one")):
        for policy in POLICIES:
            extra = [row[f"{kind}: extra ms"] for row in rows if row["scheduler"] == policy]
            name = f"{policy}: most ms added to a step {text}"
            claims.append(Claim.of(name, max(extra, default=float("nan")), "<=", ALLOWED_MS))
    return claims


def draw(rows: Sequence[dict[str, Any]], axes: Axes) -> None:
    """What each side adds, by the number of clients; a full line for steps that admit nobody."""
    for number, side in enumerate(SIDES[1:]):
        found = [row for row in rows if row["scheduler"] == side]
        clients = [row["clients"] for row in found]
        for kind, line in (("decode", "-"), ("admission", "--")):
            extra = [row.get(f"{kind}: extra ms", float("nan")) for row in found]
            axes.plot(clients, extra, line, color=f"C{number}", marker="o", label=f"{side}, {kind}")
    axes.axhline(ALLOWED_MS, color="0.5", linewidth=1, label="3 % of 10 ms")
    axes.set_xscale("log")
    axes.set_xlabel("clients")
    axes.set_ylabel("ms added to a step, median")
    axes.legend(fontsize="small", ncols=2)
