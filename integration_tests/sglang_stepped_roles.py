"""SGLang's real scheduler of a prefill or a decode server, stepped without a model and without the other
server (SGLang's own ``fake`` transfers, which end at once).

    python sglang_stepped_roles.py < processes.json

A process is an object with ``role``, ``shape`` (fields of ``EngineShape``), ``policy`` (that Penstock is
asked for, or null) and ``runs``, objects with ``section`` (what the policy is asked for; none without one),
``asks`` (rows of round, id, prompt tokens, output tokens, and perhaps milliseconds to the first token; what
an id has before a dash is its client), and perhaps ``seats`` (requests that run at most), ``round_s`` (how
long a round takes), ``aborts`` (rows of round and id), ``retract_at`` (rounds in which SGLang retracts a
request, as if memory had run out) and ``late`` (by id the round in which its prefill server answers).
Written is for each process a list of one object a run: in which order requests were computed first, given
memory and seats, came back after a retraction and ended, and what the policy counted and has left.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from penstock.simulation.engine import VirtualClock
from penstock.simulation.records import Ask, Piece

MOST_ROUNDS = 5000
SEATS = 64
BACKUP = {"disaggregation_decode_retraction_backup": "cpu_tensor"}
LISTS = ("computed", "memory", "seats", "back", "ended")


def process(given: dict[str, Any]) -> list[dict[str, Any]]:
    """All runs of a process, in one that SGLang has loaded no plugins in."""
    asked = {"scheduler": {"policy": given["policy"]}}
    os.environ["PENSTOCK_CONFIG"] = json.dumps(asked) if given["policy"] else ""
    from sglang.srt.managers import scheduler as module
    from sglang.srt.runtime_context import get_context

    from penstock.simulation.sglang_engine import EngineShape, SglangEngine

    original = module.Scheduler.__init__

    def begin(scheduler: Any, *arguments: Any) -> None:
        # The settings of a prefill server do not take it.
        get_context().override("stepped", disaggregation_transfer_backend="fake")
        original(scheduler, *arguments)

    module.Scheduler.__init__ = begin
    role = {"disaggregation_mode": given["role"], "disaggregation_transfer_backend": "nixl", **BACKUP}
    more = {**role, **given["shape"].pop("more", {})}
    engine = SglangEngine(EngineShape(max_running_requests=SEATS, **given["shape"], more=more))
    lists = watched(engine.scheduler, given["role"])
    meet_at_once(engine.scheduler)
    found = []
    for run in given["runs"]:
        for noted in lists.values():
            noted.clear()
        found.append(one_run(engine, given["role"], run, lists))
    return found


def watched(scheduler: Any, role: str) -> dict[str, list[str]]:
    """Lists that ids are added to as the scheduler goes on."""
    lists: dict[str, list[str]] = {name: [] for name in LISTS}

    def note(name: str, requests: Iterable[Any]) -> None:
        lists[name] += [request.rid for request in requests]

    def hear(owner: Any, name: str, of: Callable[[tuple[Any, ...], Any], None]) -> None:
        original = getattr(owner, name)

        def heard(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            of(args, found)
            return found

        setattr(owner, name, heard)

    def new(batch: Any) -> Iterable[Any]:
        return [request for request in batch.reqs if request.rid not in lists["computed"]]

    hear(scheduler, "run_batch", lambda given, _: note("computed", new(given[0])))

    def ended(given: tuple[Any, ...], _: Any) -> None:
        note("ended", (request for request in given[0].reqs if request.finished()))

    hear(scheduler, "process_batch_result", ended)
    if role == "prefill":
        hear(scheduler, "process_disagg_prefill_inflight_queue", lambda _, done: note("ended", done))
        return lists
    moving, queue = scheduler.disagg_decode_transfer_queue, scheduler.disagg_decode_prealloc_queue
    hear(moving, "extend", lambda given, _: note("memory", (one.req for one in given[0])))
    hear(queue, "resume_retracted_reqs", lambda _, back: note("back", back))
    seated: list[Any] = []

    def seat(_: Any, batch: Any) -> None:
        seated[:] = batch.reqs if batch else ()
        note("seats", seated)

    hear(scheduler, "get_new_prebuilt_batch", seat)
    # For some the first token is the last, and no pass computes one.
    hear(
        scheduler,
        "get_next_disagg_decode_batch_to_run",
        lambda *_: note("ended", (request for request in seated if request.finished())),
    )
    return lists


def meet_at_once(scheduler: Any) -> None:
    """Give requests an address that SGLang takes for none."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    original = scheduler.handle_generate_request

    def handle(request: Any) -> None:
        request.bootstrap_host, request.bootstrap_port, request.bootstrap_room = FAKE_BOOTSTRAP_HOST, 1, 1
        original(request)

    scheduler.handle_generate_request = handle


def one_run(engine: Any, role: str, given: dict[str, Any], lists: dict[str, list[str]]) -> dict[str, Any]:
    """Rounds of the scheduler's loop until nothing is left."""
    from penstock.plugins.sglang.scheduler_hooks import install_policy
    from penstock.plugins.sglang.settings import scheduler_config

    scheduler, clock = engine.scheduler, VirtualClock()
    scheduler.max_running_requests = given.get("seats", SEATS)
    if given.get("section"):
        config = scheduler_config({"scheduler": given["section"]})
        assert config is not None
        install_policy(scheduler, config, clock)
    turn = {"prefill": turn_of_prefill, "decode": turn_of_decode}[role]
    number, last = 0, max(row[0] for row in given["asks"])
    while number <= last or left(scheduler, role):
        come_and_go(engine, role, given, number)
        turn(scheduler, retract=number in given.get("retract_at", ()))
        number += 1
        clock.advance_to(number * given.get("round_s", 0.0))
        assert number < MOST_ROUNDS, engine.describe()
    turn(scheduler)
    # SGLang's own check for leaks.
    scheduler.on_idle()
    return {**{name: list(noted) for name, noted in lists.items()}, **counted(scheduler.policy)}


def counted(policy: Any) -> dict[str, Any]:
    """What a policy of ours has left, and has counted."""
    if hasattr(policy, "totals"):
        policy.check_integrity(set())
        return {"left": len(policy.records) + len(policy.planner.backlog), "slo": policy.totals.payload()}
    passes = getattr(policy, "passes", None)
    if passes is None:
        return {}
    passes.begin([])
    passes.check_integrity([])
    return {
        "left": len(passes),
        "service": {c.client: [c.extend_tokens, c.output_tokens] for c in passes.order.clients()},
        "expected": sum(account.expected for account in passes.order._book),
    }


def left(scheduler: Any, role: str) -> bool:
    """Whether anything waits or runs."""
    lists = [scheduler.waiting_queue, scheduler.running_batch.reqs]
    if role == "prefill":
        lists += [scheduler.disagg_prefill_bootstrap_queue.queue, scheduler.disagg_prefill_inflight_queue]
        return any(lists) or scheduler.chunked_req is not None
    queue = scheduler.disagg_decode_prealloc_queue
    return any([*lists, queue.queue, queue.retracted_queue, scheduler.disagg_decode_transfer_queue.queue])


def come_and_go(engine: Any, role: str, given: dict[str, Any], number: int) -> None:
    """Who arrives, who is given up and whose prefill server answers in a round."""
    from sglang.srt.managers.io_struct import AbortReq

    for place, (at, name, prompt, output, *ttft_ms) in enumerate(given["asks"], start=10**6):
        if at == number:
            ask = Ask(
                request_id=name,
                arrival_s=0.0,
                prompt=(Piece(place, prompt),),
                output_tokens=output,
                answer=place,
                client=name.partition("-")[0] if "-" in name else "",
                ttft_slo_ms=ttft_ms[0] if ttft_ms else None,
            )
            engine.add(ask)
    for at, name in given.get("aborts", ()):
        if at == number:
            engine.scheduler.abort_request(AbortReq(rid=name))
    if late := given.get("late"):
        assert role == "decode"
        for one in engine.scheduler.disagg_decode_prealloc_queue.queue:
            one.kv_receiver.bootstrap_done = late.get(one.req.rid, 0) <= number


def turn_of_prefill(scheduler: Any, *, retract: bool = False) -> None:
    """One turn of the loop of a prefill server, which retracts nobody."""
    assert not retract
    scheduler.waiting_queue.extend(scheduler.disagg_prefill_bootstrap_queue.pop_bootstrapped())
    plan = scheduler.get_next_disagg_prefill_batch_to_run(
        running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
    )
    compute(scheduler, plan)
    scheduler.process_disagg_prefill_inflight_queue()


def turn_of_decode(scheduler: Any, *, retract: bool = False) -> None:
    """One turn of the loop of a decode server."""
    from sglang.srt.managers import scheduler as module

    # What SGLang's own variables for tests set.
    module.TEST_RETRACT, module.TEST_RETRACT_INTERVAL = retract, 1
    scheduler.process_decode_queue()
    compute(scheduler, scheduler.get_next_disagg_decode_batch_to_run(running_batch=scheduler.running_batch))


def compute(scheduler: Any, plan: Any) -> None:
    """Run a batch, if there is one."""
    scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
    if batch is not None:
        scheduler.process_batch_result(batch, scheduler.run_batch(batch))
    scheduler.last_batch = batch


def main() -> None:
    """Run what standard input asks for."""
    from penstock.benchmarks.sglang_dlpm import import_quietly

    given = json.load(sys.stdin)
    import_quietly()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(process, given, chunksize=1)))


if __name__ == "__main__":
    main()
