"""``penstock bench sglang-scheduler``: what a waiting policy costs a pass of SGLang's scheduler.

SGLang's real ``Scheduler`` without a model, with 256 requests running and as many waiting as are asked for:
each that ends is followed by a new one. A process has one scheduler, so each policy has a process of its own,
and they make some passes in turn: what else the machine does meets all alike. What is compared is processor
time of one thread, with the calls that a pass makes beside. A pass is the choice of its batch and the
processing of its result.

A policy of ours admits requests in another order than they came in, so that stock's own code meets them, and
what they hold, all over the memory. One row is stock's ``fcfs`` over a queue that is shuffled outside of the
passes: what it takes beyond ``fcfs`` is that alone.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console

from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Cell, Claim, Environment, Report
from penstock.benchmarks.sglang_dlpm import VARIABLE, import_quietly, on_virtual_clock
from penstock.simulation.records import Ask, Piece

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from penstock.benchmarks.flowkv_part import Tell
    from penstock.simulation.sglang_engine import SglangEngine

BARE = "fcfs, Penstock not loaded"
SHUFFLED = "fcfs, queue shuffled"
STOCK = ("fcfs", BARE, "lpm", SHUFFLED)
"""The others have Penstock loaded, and nothing asked of it."""
POLICIES = (*STOCK, "vtc", "dlpm", "slo")
RUNNING, WAITING = 256, 1_000
CLIENTS = 100
PREFIX, OWN = 64, 136
"""Tokens of a prompt: those that a client's prompts share, and its own."""
OUTPUTS = (200, 1_000)
GROUPS = ("sglang.srt.plugins", "sglang.srt.platforms")
ENTRY = "penstock.plugins.sglang.entry"
TARGETS_MS = ((2_000.0, 50.0), (60_000.0, 100.0), (600_000.0, 250.0))
PASS_S = 0.01
"""By how much the clock goes on with every pass, beside the time that passes take: what a policy may spend on
look-ups is bounded in time."""
SETTLING, PASSES, COUNTED = 260, 600, 20
QUICK_PASSES = 200
BLOCK = 10
DECODE, ADMISSION = KINDS = ("decode", "admission")
"""Passes that admit nobody, and passes that do."""
Block = dict[str, list[float]]
"""Milliseconds of passes by kind."""
ALLOWED_MS = 0.3
"""3 % of a pass of 10 ms."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Passes of one policy, by kind: processor time of each in milliseconds, and calls in the median."""

    policy: str
    cpu_ms: dict[str, list[float]]
    calls: dict[str, float]
    work: dict[str, float]
    """What the policy counted, a pass."""


@click.command("sglang-scheduler")
@click.option("--quick", is_flag=True, help="Fewer passes.")
@click.option(
    "--waiting", type=click.IntRange(1), default=WAITING, show_default=True, help="Requests that wait."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option("--seed", default=0, show_default=True)
def bench(quick: bool, waiting: int, json_file: Path | None, seed: int) -> None:
    """Measure SGLang's scheduler with each policy beside SGLang's own fcfs and lpm.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    if find_spec("sglang") is None:
        raise click.ClickException("this bench steps SGLang's own scheduler: install penstock[sglang]")
    console = wide(Console())
    with Narrator(console).step("sglang-scheduler") as tell:
        import_quietly()
        costs = in_turn(waiting, QUICK_PASSES if quick else PASSES, seed, tell)
    report = Report(
        bench="sglang-scheduler",
        environment=Environment.detect(seed),
        rows=tuple(row_of(cost, costs[0]) for cost in costs),
        claims=tuple(claims_of(costs)),
    )
    report.show(console, title=f"sglang-scheduler, {RUNNING} running, {waiting:,} waiting")
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def in_turn(waiting: int, passes: int, seed: int, tell: Tell) -> list[Cost]:
    """Every policy's scheduler in a process, ``BLOCK`` passes of each after the other."""
    context = multiprocessing.get_context("fork")
    ends = {policy: context.Pipe() for policy in POLICIES}
    processes = [
        context.Process(target=serve, args=(policy, waiting, seed, theirs))
        for policy, (_, theirs) in ends.items()
    ]
    found: dict[str, list[Block]] = {policy: [] for policy in POLICIES}
    try:
        for process in processes:
            process.start()
        for policy, (ours, _) in ends.items():
            ours.recv()
            tell(f"{policy} has settled")
        for _block in range(passes // BLOCK):
            for policy, (ours, _) in ends.items():
                ours.send(True)
                found[policy].append(ours.recv())
        costs = []
        for policy, (ours, _) in ends.items():
            ours.send(False)
            costs.append(cost_of(policy, found[policy], *ours.recv()))
        return costs
    finally:
        for process in processes:
            process.terminate()
            process.join()


def serve(policy: str, waiting: int, seed: int, asker: Connection) -> None:
    """One policy, in a process that SGLang has loaded no plugins in: a block of passes each time that it is
    asked to go on, and at the end the calls of further ones and what the policy counted."""
    section: dict[str, Any] | None = None if policy in STOCK else {"policy": policy}
    if section is not None and policy != "slo":
        # Everybody has an account from the first request on: that they are opened is no part of a pass.
        section["newcomers_per_refill"] = CLIENTS
    os.environ[VARIABLE] = json.dumps({"scheduler": section}) if section else ""
    if policy == BARE:
        others = {point.name for group in GROUPS for point in entry_points(group=group)} - {"penstock"}
        os.environ["SGLANG_PLUGINS"] = ",".join(sorted(others)) or "none"
    load = Load(policy, waiting, seed)
    assert (ENTRY in sys.modules) == (policy != BARE)
    load.passes(SETTLING)
    before = load.work()
    gc.disable()
    asker.send(None)
    while asker.recv():
        asker.send(load.passes(BLOCK))
    work = {name: value - before[name] for name, value in load.work().items()}
    asker.send(([load.counted() for _ in range(COUNTED)], work))


def cost_of(
    policy: str, blocks: Sequence[Block], counted: list[tuple[str, int]], work: dict[str, float]
) -> Cost:
    """What was found of one policy."""
    passes = sum(len(found) for block in blocks for found in block.values())
    calls = {kind: [number for its, number in counted if its == kind] for kind in KINDS}
    return Cost(
        policy=policy,
        cpu_ms={kind: [ms for block in blocks for ms in block[kind]] for kind in KINDS},
        calls={kind: median(found) for kind, found in calls.items() if found},
        work={name: value / passes for name, value in work.items()},
    )


class PassingClock:
    """Seconds: those of all turns, and the processor time of the thread, unless it ``stands`` in a turn."""

    def __init__(self, *, stands: bool) -> None:
        self._stands = stands
        self._turns_s = 0.0

    def __call__(self) -> float:
        return self._turns_s + (0.0 if self._stands else time.thread_time())

    def turn(self, seconds: float) -> None:
        """The next turn begins, ``seconds`` after the one before."""
        self._turns_s += seconds


class Load:
    """A scheduler of SGLang's under ``policy`` with its requests."""

    def __init__(self, policy: str, waiting: int, seed: int) -> None:
        from penstock.simulation.sglang_engine import EngineShape, SglangEngine

        self._rng = Random(seed)
        self._serial = count()
        self._shuffles = Random(seed + 1) if policy == SHUFFLED else None
        self._targets = TARGETS_MS if policy == "slo" else ((None, None),)
        # Plans are made by how long the model takes, and there is none.
        self._clock = PassingClock(stands=policy == "slo")
        shape = EngineShape(
            kv_tokens=RUNNING * (PREFIX + OWN + OUTPUTS[1]) * 2,
            max_running_requests=RUNNING,
            schedule_policy="lpm" if policy == "lpm" else "fcfs",
        )
        prepare = None if policy in STOCK else on_virtual_clock
        self.engine: SglangEngine = SglangEngine(shape, clock=self._clock, prepare=prepare)
        for _ in range(RUNNING + waiting):
            self._arrive()
        self._shuffle()

    def passes(self, number: int) -> Block:
        """Make so many; processor time of those that admit nobody, and of those that admit somebody."""
        found: Block = {kind: [] for kind in KINDS}
        for _ in range(number):
            began_s = time.thread_time()
            kind, ended = self._pass()
            found[kind].append(1e3 * (time.thread_time() - began_s))
            self._follow(ended)
        return found

    def counted(self) -> tuple[str, int]:
        """Make one pass and count its calls, of functions in Python and in C."""
        events: Counter[str] = Counter()
        sys.setprofile(lambda frame, event, argument: events.update((event,)))
        try:
            kind, ended = self._pass()
        finally:
            sys.setprofile(None)
        self._follow(ended)
        return kind, events["call"] + events["c_call"]

    def work(self) -> dict[str, float]:
        """What the planner counted."""
        planner: Any = getattr(self.engine.scheduler.policy, "planner", None)
        if planner is None:
            return {}
        return {"plans": planner.counters.plans, "replans": planner.replan_counters.replans}

    def _pass(self) -> tuple[str, int]:
        batch = self.engine.schedule()
        admits = any(row.start < PREFIX + OWN for row in batch.rows)
        ended = sum(progress.finished for progress in self.engine.complete(batch))
        return ADMISSION if admits else DECODE, ended

    def _follow(self, ended: int) -> None:
        self._clock.turn(PASS_S)
        for _ in range(ended):
            self._arrive()
        self._shuffle()

    def _shuffle(self) -> None:
        if self._shuffles is not None:
            self._shuffles.shuffle(self.engine.scheduler.waiting_queue)

    def _arrive(self) -> None:
        serial = next(self._serial)
        client = self._rng.randrange(CLIENTS)
        ttft, tpot = self._targets[serial % len(self._targets)]
        self.engine.add(
            Ask(
                request_id=str(serial),
                arrival_s=self._clock(),
                prompt=(Piece(10 + client, PREFIX), Piece(1_000 + serial % 20_000, OWN)),
                output_tokens=self._rng.randint(*OUTPUTS),
                client=f"client-{client}",
                ttft_slo_ms=ttft,
                tpot_slo_ms=tpot,
            )
        )


def row_of(cost: Cost, plain: Cost) -> dict[str, Cell]:
    """One policy beside ``plain``."""
    row: dict[str, Cell] = {"policy": cost.policy}
    for kind in KINDS:
        found = cost.cpu_ms[kind]
        row[f"{kind} passes"] = len(found)
        row[f"{kind} ms"] = median(found) if found else None
        row[f"{kind} added ms"] = added_ms(cost, plain, kind)
        row[f"{kind} calls"] = cost.calls.get(kind)
    for name in ("plans", "replans"):
        row[f"{name} a pass"] = cost.work.get(name)
    return row


def added_ms(cost: Cost, plain: Cost, kind: str) -> float | None:
    """What the policy adds to a pass, in the median."""
    if not cost.cpu_ms[kind] or not plain.cpu_ms[kind]:
        return None
    return median(cost.cpu_ms[kind]) - median(plain.cpu_ms[kind])


def claims_of(costs: Sequence[Cost]) -> list[Claim]:
    """What must hold of the policies of ours."""
    plain, ours = costs[0], [cost for cost in costs if cost.policy not in STOCK]
    off = [
        Claim.of(f"installed and off: calls added, {kind} pass", plain.calls[kind] - number, "==", 0)
        for cost in costs
        if cost.policy == BARE
        for kind, number in cost.calls.items()
    ]
    ordered = [cost for cost in costs if cost.policy == SHUFFLED]
    return off + [
        Claim.of(f"{cost.policy}: ms added{beyond}, {kind} pass", value, "<=", ALLOWED_MS)
        for cost in ours
        for beyond, base in (("", plain), *((" beyond a shuffled queue", one) for one in ordered))
        for kind in KINDS
        if (value := added_ms(cost, base, kind)) is not None
    ]
