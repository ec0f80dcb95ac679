"""What a policy adds to a step of vLLM's scheduler, in processor time, beside vLLM's own in the same run.

Three schedulers step in turn under the same load, 256 requests running and 10,000 waiting: the policy's,
vLLM's own, and vLLM's own *told the order*: it serves the very requests that the policy admitted, step by
step. The last one makes the same steps, so step by step the difference is the policy's *own work*. What it
takes beyond the plain one is the *order alone*: other prefix hits, and requests that lie elsewhere in memory.
No policy of that order can take less. A policy that cuts steps otherwise (``slo``) has nobody to follow.

Each has a process of its own, as an engine's scheduler has: in one process CPython would specialize vLLM's
methods for one class and then for the other, and the first to step would pay for it.

Requests lie scattered in memory, for all of them, as they do once an engine has served as many as wait
(``Load.aged``). What that costs is a row of its own: vLLM's own scheduler with requests made side by side,
which only the first ones of a fresh process are.

What the device waits for is ``schedule`` and ``update_from_output``, statistics included: the *critical path*
of a step. Between them an engine calls ``get_grammar_bitmask`` while its device computes; what a policy does
there is *behind the model*, and delays nothing as long as the model takes longer. It is timed apart, and the
sum is shown, too. Where scheduling is asynchronous all of it is behind the model of the step before.

Steps are compared by kind, those that admit nobody and those that admit one request, in the median and in the
mean; and all of them in the mean, with the requests that a step serves, since one that serves fewer is
shorter. Python's garbage collection is off.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import product
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from msgspec import structs

from penstock.benchmarks.flowkv_part import Finding, Options, Tell, percentile
from penstock.benchmarks.report import Cell, Claim

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from matplotlib.axes import Axes

    from penstock.benchmarks.scheduler_engine import Load, Stepped

STOCK = "stock"
TOLD = "stock, told the order"
FRESH = "stock, a fresh process"
POLICIES = ("fcfs", "dlpm", "vtc", "lpm", "slo")
ENGINES = (
    "penstock.benchmarks.scheduler_engine",
    "penstock.plugins.vllm.request_scheduler",
    "penstock.plugins.vllm.slo_scheduling",
)
"""Imported once, before processes are forked."""
KINDS = {"decode": 0, "admission": 1}
"""Steps by the number of requests that they admit."""
CLIENTS, QUICK_CLIENTS = (1, 100, 1_000), (100,)
WARM_UP_STEPS, SETTLING_STEPS = 60, 260
"""The latter for ``slo``, whose model of step times is fitted more often while it is young."""
STEPS, QUICK_STEPS = 600, 150
BLOCK = 5
"""Steps that a scheduler makes before it is the next one's turn."""
ALLOWED_MS = 0.3
"""3 % of a step of 10 ms."""
STEP_S = 0.01
"""By how much the clock of the ``slo`` policy goes on with every step."""
TARGETS_MS = ((2_000.0, 50.0), (60_000.0, 100.0), (600_000.0, 250.0))


@dataclass(slots=True)
class Step:
    """One step: requests that it admitted and how many it served; processor and wall time of its critical
    path, and processor time behind the model, in milliseconds."""

    admitted: tuple[str, ...]
    served: int
    cpu_ms: float
    wall_ms: float
    behind_ms: float


@dataclass(slots=True)
class Times:
    """What was measured of one scheduler. Arrivals are in microseconds of processor time."""

    steps: list[Step] = field(default_factory=list)
    arrivals_us: list[float] = field(default_factory=list)
    admitted_tokens: int = 0
    cached_tokens: int = 0

    def of(self, kind: str) -> list[Step]:
        """The steps of a kind."""
        return [step for step in self.steps if len(step.admitted) == KINDS[kind]]


def measure(options: Options, tell: Tell) -> Finding:
    """Run the load with each number of clients and each policy; a row for each."""
    from penstock.benchmarks.scheduler_engine import Load

    numbers = QUICK_CLIENTS if options.quick else CLIENTS
    # A process is fresh once.
    cases = [(FRESH, numbers[-1]), *product(POLICIES, numbers)]
    rows: list[dict[str, Cell]] = []
    for policy, clients in cases:
        tell(f"{clients:,} clients, {policy}")
        load = Load(clients=clients, seed=options.seed, targets_ms=TARGETS_MS if policy == "slo" else ())
        times = compare(load, QUICK_STEPS if options.quick else STEPS, policy)
        rows.append(row_of(policy, clients, times))
    return Finding(rows=rows, claims=claims_of(rows), draw=partial(draw, rows))


def compare(load: Load, steps: int, policy: str) -> dict[str, Times]:
    """Step a scheduler of ``policy`` and vLLM's own in turn, ``steps`` times after a warm-up."""
    sides = [policy, STOCK] if policy in ("slo", FRESH) else [policy, TOLD, STOCK]
    for module in ENGINES:
        import_module(module)
    context = multiprocessing.get_context("fork")
    pipes = {side: context.Pipe() for side in sides}
    processes = [
        context.Process(target=serve, args=(side, load, theirs)) for side, (_, theirs) in pipes.items()
    ]
    try:
        for process in processes:
            process.start()
        ends = {side: ours for side, (ours, _) in pipes.items()}
        for number in (SETTLING_STEPS if policy == "slo" else WARM_UP_STEPS, steps):
            times = step_in_turn(ends, number)
        return times
    finally:
        for process in processes:
            process.terminate()
            process.join()


def step_in_turn(ends: dict[str, Connection], steps: int) -> dict[str, Times]:
    """So many steps of each; the first one leads those that follow."""
    leader = next(iter(ends))
    while steps > 0:
        led: list[tuple[str, ...]] = []
        for side, end in ends.items():
            end.send((min(BLOCK, steps), led))
            admitted = end.recv()
            led = admitted if side == leader else led
        steps -= BLOCK
    for end in ends.values():
        end.send(None)
    return {side: end.recv() for side, end in ends.items()}


def serve(side: str, load: Load, asker: Connection) -> None:
    """One scheduler, in a process of its own: makes as many steps as it is asked for and says whom each
    admitted. Asked for none, it says how long those took that it made since it last did."""
    with quiet():
        engine, times = stepped(side, load), Times()
        while True:
            if (asked := asker.recv()) is None:
                asker.send(times)
                times = Times()
                continue
            number, led = asked
            make_steps(engine, times, number, led)
            asker.send([one.admitted for one in times.steps[-number:]])


def make_steps(engine: Stepped, times: Times, number: int, led: Sequence[tuple[str, ...]] = ()) -> None:
    """So many steps. ``led`` are the requests that another scheduler admitted in each of them."""
    for place in range(number):
        if led:
            engine.follow(led[place])
        step(engine, times)


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

    from penstock.benchmarks.scheduler_engine import Follower, Stepped
    from penstock.plugins.vllm.request_scheduler import SyncRequestScheduler
    from penstock.plugins.vllm.slo_scheduling import SyncSLOScheduler

    if side == STOCK:
        return Stepped(load, Scheduler, None)
    if side == TOLD:
        return Follower(load, Scheduler, None)
    if side == FRESH:
        return Stepped(structs.replace(load, aged=False), Scheduler, None)
    if side != "slo":
        # Everybody has an account from the first request on: that they are opened is no part of a step.
        section = {"policy": side, "newcomers_per_refill": load.clients}
        return Stepped(load, partial(SyncRequestScheduler, front_end_exports=True), section)
    clock = SteadyClock()
    make = partial(SyncSLOScheduler, front_end_exports=True, clock=clock, wall_clock=clock)
    return Stepped(load, make, {"policy": side})


class SteadyClock:
    """Seconds that go on by ``STEP_S`` with every step, so that deadlines depend on nobody else's load."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def step(engine: Stepped, times: Times) -> None:
    """One step, and an arrival for each request that ended."""
    scheduler = engine.scheduler
    before = len(scheduler.requests)
    begin = Stopwatch()
    output = scheduler.schedule()
    scheduled = begin.spent_ms()
    behind = Stopwatch()
    scheduler.get_grammar_bitmask(output)
    behind_ms, _ = behind.spent_ms()
    sampled = engine.sampled(output)
    if isinstance(clock := getattr(scheduler, "clock", None), SteadyClock):
        clock.now_s += STEP_S
    received = Stopwatch()
    scheduler.update_from_output(output, sampled)
    updated = received.spent_ms()
    admitted = output.scheduled_new_reqs
    names = tuple(new.req_id for new in admitted)
    served = len(output.num_scheduled_tokens)
    times.steps.append(Step(names, served, scheduled[0] + updated[0], scheduled[1] + updated[1], behind_ms))
    times.admitted_tokens += sum(len(new.prompt_token_ids) for new in admitted)
    times.cached_tokens += sum(new.num_computed_tokens for new in admitted)
    for _ in range(before - len(scheduler.requests)):
        request = engine.next_request()
        begin = Stopwatch()
        engine.arrive(request)
        times.arrivals_us.append(1e3 * begin.spent_ms()[0])


class Stopwatch:
    """Processor time of this thread, and wall time."""

    def __init__(self) -> None:
        self._wall_ns, self._cpu_ns = time.perf_counter_ns(), time.thread_time_ns()

    def spent_ms(self) -> tuple[float, float]:
        """Both since the start, processor time first."""
        cpu_ns, wall_ns = time.thread_time_ns(), time.perf_counter_ns()
        return (cpu_ns - self._cpu_ns) / 1e6, (wall_ns - self._wall_ns) / 1e6


def row_of(policy: str, clients: int, times: dict[str, Times]) -> dict[str, Cell]:
    """What a policy adds: medians, means and 99th percentiles of its steps, beside both of vLLM's."""
    row: dict[str, Cell] = {"policy": policy, "clients": clients}
    for kind, admitted in KINDS.items():
        own = times[policy].of(kind)
        stock = [step.cpu_ms for step in times[STOCK].of(kind)]
        if not own or not stock:
            continue
        row[f"{kind}: steps"] = len(own)
        row[f"{kind}: ms"] = round(median(step.cpu_ms for step in own), 3)
        row[f"{kind}: P99 ms"] = round(percentile([step.cpu_ms for step in own], 0.99), 3)
        row[f"{kind}: wall ms"] = round(median(step.wall_ms for step in own), 3)
        row[f"{kind}: stock ms"] = round(median(stock), 3)
        row[f"{kind}: beyond stock ms"] = round(median(step.cpu_ms for step in own) - median(stock), 3)
        row[f"{kind}: mean beyond stock ms"] = round(mean(step.cpu_ms for step in own) - mean(stock), 3)
        row[f"{kind}: mean behind model ms"] = round(mean(step.behind_ms for step in own), 3)
        if TOLD in times:
            pairs = zip(times[policy].steps, times[TOLD].steps, strict=True)
            extra = [one.cpu_ms - other.cpu_ms for one, other in pairs if len(one.admitted) == admitted]
            row[f"{kind}: own ms"] = round(median(extra), 3)
            told = median(step.cpu_ms for step in times[TOLD].of(kind))
            row[f"{kind}: order alone ms"] = round(told - median(stock), 3)
    own, other = times[policy].steps, times[STOCK].steps
    beyond_ms = mean(step.cpu_ms for step in own) - mean(step.cpu_ms for step in other)
    behind_ms = mean(step.behind_ms for step in own)
    if TOLD in times:
        told_ms = mean(step.cpu_ms for step in times[TOLD].steps) - mean(step.cpu_ms for step in other)
        row["mean own ms"] = round(beyond_ms - told_ms, 3)
        row["mean order alone ms"] = round(told_ms, 3)
    row["mean beyond stock ms"] = round(beyond_ms, 3)
    row["mean behind model ms"] = round(behind_ms, 3)
    row["P99 behind model ms"] = round(percentile([step.behind_ms for step in own], 0.99), 3)
    row["mean of both ms"] = round(beyond_ms + behind_ms, 3)
    row["served a step"] = round(mean(step.served for step in own))
    row["stock served a step"] = round(mean(step.served for step in other))
    for name, side in (("arrival us", policy), ("stock arrival us", STOCK)):
        if times[side].arrivals_us:
            row[name] = round(median(times[side].arrivals_us), 1)
    if times[policy].admitted_tokens:
        row["cached %"] = round(100 * times[policy].cached_tokens / times[policy].admitted_tokens, 1)
    return row


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """That no policy adds more to the critical path than is allowed, however many clients there are."""
    claims = []
    for policy in POLICIES:
        found = [row for row in rows if row["policy"] == policy]
        for column, told in (("own", "its own work"), ("beyond stock", "beyond stock's")):
            means = [row[key] for row in found if (key := f"mean {column} ms") in row]
            if means:
                name = f"{policy}: most ms added to a step's critical path, {told}, mean"
                claims.append(Claim.of(name, max(means), "<=", ALLOWED_MS))
        for kind, text in (("decode", "that admits nobody"), ("admission", "that admits one")):
            for column, told in (("own", ", its own work"), ("beyond stock", ", beyond stock's")):
                extra = [row[key] for row in found if (key := f"{kind}: {column} ms") in row]
                if extra:
                    name = f"{policy}: most ms added to the critical path of a step {text}{told}"
                    claims.append(Claim.of(name, max(extra), "<=", ALLOWED_MS))
    return claims


def draw(rows: Sequence[dict[str, Any]], axes: Axes) -> None:
    """What each policy adds to steps that admit nobody (full) and one (dashed), by the number of clients."""
    for number, policy in enumerate(POLICIES):
        found = [row for row in rows if row["policy"] == policy]
        clients = [row["clients"] for row in found]
        for kind, line in (("decode", "-"), ("admission", "--")):
            beyond = [row.get(f"{kind}: beyond stock ms", float("nan")) for row in found]
            extra = [row.get(f"{kind}: own ms", other) for row, other in zip(found, beyond, strict=True)]
            axes.plot(clients, extra, line, color=f"C{number}", marker="o", label=f"{policy}, {kind}")
    axes.axhline(ALLOWED_MS, color="0.5", linewidth=1, label="3 % of 10 ms")
    axes.set_xscale("log")
    axes.set_xlabel("clients")
    axes.set_ylabel("ms added to a step's critical path, median")
    axes.legend(fontsize="small", ncols=2)
