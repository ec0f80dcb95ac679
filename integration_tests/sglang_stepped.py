"""Runs of SGLang's real scheduler on a virtual clock, each in a process of its own.

    python sglang_stepped.py < runs.json

A run is an object with ``section`` (what Penstock is asked for, or null), ``shape`` (fields of
``EngineShape``), perhaps ``retract_every`` (so many passes SGLang retracts a request, as if memory had run
out), perhaps ``compare_plans`` (where nothing is planned a plan is made, and must hold nothing else), and
``asks`` (rows of id, arrival, prompt tokens, output tokens, time to first token and per token in milliseconds
or null; what an id has before a dash is its client). Written is one object a run: ``requests`` by id, each
with the times of its tokens since it came, and what the policy counted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
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
    clock = VirtualClock()
    prepare = on_virtual_clock if given["section"] else None
    engine = SglangEngine(EngineShape(**given["shape"]), clock=clock, prepare=prepare)
    # Keys of workloads are larger than vocabularies.
    asks = [
        Ask(
            request_id=name,
            arrival_s=arrival,
            prompt=(Piece(number, prompt),),
            output_tokens=output,
            answer=number,
            client=name.partition("-")[0] if "-" in name else "",
            ttft_slo_ms=ttft,
            tpot_slo_ms=tpot,
        )
        for number, (name, arrival, prompt, output, ttft, tpot) in enumerate(given["asks"], start=10**6)
    ]
    if hasattr(engine.scheduler.policy, "records"):
        check_each_pass(engine)
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
    }
    if hasattr(policy, "totals"):
        policy.check_integrity(set())
        found["stood"] = len(stood)
        found["counted"] = policy.totals.payload()
        found["left"] = len(policy.records) + len(policy.planner.backlog)
    return found


def check_each_pass(engine: Any) -> None:
    """Have the policy assert after each pass that what it keeps is what SGLang's requests say."""
    complete, policy = engine.complete, engine.scheduler.policy

    def checked(batch: Any) -> Any:
        progress = complete(batch)
        policy.check_integrity(set(policy.records.beside(())))
        return progress

    engine.complete = checked


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


def main() -> None:
    """Run what standard input asks for."""
    from penstock.benchmarks.sglang_dlpm import import_quietly

    runs = json.load(sys.stdin)
    import_quietly()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(run, runs, chunksize=1)))


if __name__ == "__main__":
    main()
