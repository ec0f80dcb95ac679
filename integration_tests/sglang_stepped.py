"""Runs of SGLang's real scheduler on a virtual clock, each in a process of its own.

    python sglang_stepped.py [SEED] < runs.json

A run is an object with ``section`` (what Penstock is asked for, or null), ``shape`` (fields of
``EngineShape``), perhaps ``retract_every`` (so many passes SGLang retracts a request, as if memory had run
out), perhaps ``compare_plans`` (where nothing is planned a plan is made, and must hold nothing else), and
``asks`` (rows of id, arrival, prompt tokens, output tokens, time to first token and per token in
milliseconds or null; what an id has before a dash is its client), perhaps ``most_output_tokens`` that every
client allows; answers end by a stop token then. Prompts differ from the first token on; of ``families`` there
are so many ways in which they begin alike, with their first half. ``shared_clock`` gives the policy the clock
that ranks share, told when a pass begins; ``unstamped`` keeps from it when requests came. With a SEED the
clocks of the process itself run as no others do. Written is one object a run: ``requests`` by id, each with
the times of its tokens since it came, a digest of each pass, and what the policy counted, of its ``clients``
or in all. A run with ``storm`` is ``sglang_storm``'s; one with ``loop`` (``normal`` or ``overlap``) is
``sglang_loops``'s, in SGLang's own event loop.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from penstock.simulation.engine import Simulation, VirtualClock
from penstock.simulation.records import Ask, Piece
from penstock.simulation.step_time import load_step_time
from penstock.simulation.workloads import Fixed


def run(given: dict[str, Any]) -> dict[str, Any]:
    """One run, in a process that SGLang has loaded no plugins in."""
    os.environ["PENSTOCK_CONFIG"] = json.dumps({"scheduler": given["section"]}) if given["section"] else ""
    from sglang.srt.managers import scheduler

    from penstock.benchmarks.sglang_dlpm import on_virtual_clock
    from penstock.simulation.sglang_engine import EngineShape, SglangEngine

    if every := given.get("retract_every"):
        # What SGLang's own variables for tests set, for all runs of a process and its children.
        scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = True, every
    if "storm" in given:
        from sglang_storm import storm

        return dict(storm(given))
    if "loop" in given:
        from sglang_loops import looped

        return looped(given)
    clock = VirtualClock()
    prepare = on_virtual_clock if given["section"] else None
    if given.get("shared_clock"):
        prepare = on_shared_clock
    engine = SglangEngine(EngineShape(**given["shape"]), clock=clock, prepare=prepare)
    decided = watch(engine, clock)
    # Keys of workloads are larger than vocabularies.
    asks = [
        Ask(
            request_id=name,
            arrival_s=arrival,
            prompt=_prompt(number, prompt, given.get("families")),
            output_tokens=output,
            answer=number,
            client=name.partition("-")[0] if "-" in name else "",
            ttft_slo_ms=ttft,
            tpot_slo_ms=tpot,
            most_output_tokens=given.get("most_output_tokens"),
        )
        for number, (name, arrival, prompt, output, ttft, tpot) in enumerate(given["asks"], start=10**6)
    ]
    if hasattr(engine.scheduler.policy, "records"):
        if given.get("unstamped"):
            engine.scheduler.policy.records._front_clock = None
        check_each_pass(engine, {ask.request_id: ask for ask in asks})
    stood = compare_plans(engine.scheduler.policy) if given.get("compare_plans") else []
    result = Simulation(engine, Fixed(asks), load_step_time("opt-6.7b-a100"), clock).run()
    engine.idle()
    assert all(one.output_tokens == one.ask.output_tokens for one in result.served)
    policy = engine.scheduler.policy
    found: dict[str, Any] = {
        "requests": {
            one.ask.request_id: {
                "came": [time - one.ask.arrival_s for time in one.token_times],
                "preemptions": one.preemptions,
            }
            for one in result.served
        },
        "makespan": result.makespan_s,
        "steps": result.steps,
        "decided": decided,
    }
    if hasattr(policy, "passes"):
        found["clients"] = [repr(client) for client in policy.passes.order.clients()]
    if hasattr(policy, "totals"):
        policy.check_integrity(set())
        found["stood"] = len(stood)
        found["counted"] = policy.totals.payload()
        found["left"] = len(policy.records) + len(policy.planner.backlog)
    return found


def _prompt(number: int, tokens: int, families: int | None) -> tuple[Piece, ...]:
    if families is None:
        return (Piece(number, tokens),)
    return Piece(number % families, tokens // 2), Piece(number, tokens - tokens // 2)


def on_shared_clock(scheduler: Any, clock: Callable[[], float]) -> None:
    """Give the scheduler the policy that was asked for as one of several ranks has it."""
    from penstock.plugins.sglang.scheduler_hooks import install_policy
    from penstock.plugins.sglang.settings import inherited, scheduler_config
    from penstock.plugins.sglang.shared_clock import SharedClock

    config = scheduler_config(inherited())
    assert config is not None
    install_policy(scheduler, config, SharedClock())


def watch(engine: Any, clock: Callable[[], float]) -> list[int]:
    """A digest of each pass from now on: who computes what, who was thrown out, and which prefixes were
    looked up for that. The policy's clock is told of a pass first if it is the one that ranks share."""
    policy, schedule, idle, looked_up = engine.scheduler.policy, engine.schedule, engine.idle, []
    begin_pass = getattr(getattr(policy, "clock", None), "begin_pass", None)
    decided: list[int] = []
    if match := getattr(policy, "_hit_tokens", None):
        policy.passes.order._hit_tokens = lambda name: looked_up.append(name) or match(name)

    def begun(what: Callable[[], Any]) -> Any:
        if begin_pass is not None:
            begin_pass(clock())
        return what()

    def scheduled() -> Any:
        batch = begun(schedule)
        decided.append(zlib.crc32(repr((batch.rows, batch.preempted, looked_up)).encode()))
        looked_up.clear()
        return batch

    engine.schedule, engine.idle = scheduled, lambda: begun(idle)
    return decided


def check_each_pass(engine: Any, asks: dict[str, Ask]) -> None:
    """Have the policy assert when a pass begins that what it keeps is what SGLang's requests say, that it
    knows no more of their length than clients allow and, where they have stamps, that it counts from when
    they came."""
    policy = engine.scheduler.policy
    decide = policy.defers_prefill
    stamped = policy.records._front_clock is not None

    def checked(running_batch: Any) -> Any:
        live = policy.records.beside(())
        policy.check_integrity(set(live))
        for request in live:
            known, ask = policy.records.of(request).running, asks[request.rid]
            assert not stamped or abs(known.arrival_s - ask.arrival_s) < 1e-6
            assert known.max_output_tokens == ask.allowed_tokens
        return decide(running_batch)

    policy.defers_prefill = checked


def compare_plans(policy: Any) -> list[None]:
    """Have the policy plan wherever it finds that there is nothing to plan; an item each time."""
    decode_on, stood = policy._all_decode_on, []

    def compared(now_s: float, running: list[Any]) -> bool:
        on: bool = decode_on(now_s, running)
        if on:
            stood.append(None)
            decodes = policy.records.decoding(running, policy._in_flight())
            context = sum(request.computed_tokens for request in decodes)
            limits = policy._limits(now_s, len(decodes), context)
            plan = policy.planner.plan(now_s, decodes, policy._free_kv_tokens(), limits)
            assert not plan.waiting
            assert not plan.preempt
            assert plan.caps == dict.fromkeys(plan.order, 1)
            assert set(plan.order) == {request.rid for request in running}
        return on

    policy._all_decode_on = compared
    return stood


def unsettle(seed: int) -> None:
    """Make the clocks of this process begin elsewhere, run at another speed, and leap ahead when read."""
    draw = random.Random(seed)

    def unsettled(real: Callable[[], Any], second: float) -> Callable[[], Any]:
        begin, speed, ahead = real(), draw.uniform(0.5, 2), draw.uniform(0, 1e4)

        def read() -> Any:
            nonlocal ahead
            ahead += draw.expovariate(50_000) if draw.random() < 0.99 else draw.uniform(0, 0.1)
            return type(begin)(begin + speed * (real() - begin) + second * ahead)

        return read

    for name in ("monotonic", "perf_counter", "time", "process_time", "thread_time"):
        setattr(time, name, unsettled(getattr(time, name), 1))
        setattr(time, f"{name}_ns", unsettled(getattr(time, f"{name}_ns"), 1e9))


def main() -> None:
    """Run what standard input asks for."""
    if len(sys.argv) > 1:
        unsettle(int(sys.argv[1]))
    from penstock.benchmarks.sglang_dlpm import import_quietly

    runs = json.load(sys.stdin)
    import_quietly()
    # Else each run does, for a second and more.
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.get_supported_archs()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(run, runs, chunksize=1)))


if __name__ == "__main__":
    main()
