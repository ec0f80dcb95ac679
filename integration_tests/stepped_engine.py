"""One trace through a real engine and through the simulation, step by step, each written down in one form.

Run as a program, this starts one engine core with the tiny model, its executor and its model runner, and puts
the trace through it under each policy in turn: ``python stepped_engine.py MODEL RESULT.json [overlap]``. Time
is the number of the step on both sides, so that arrivals and ageing mean the same. With ``overlap`` a step is
chosen before the one that runs has come back, as asynchronous scheduling does.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.simulation.engine import Simulation, VirtualClock
from penstock.simulation.records import Ask, Batch, Piece, Progress
from penstock.simulation.workloads import Fixed

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

    from penstock.simulation.vllm_engine import EngineShape, VllmEngine

STOCK = {
    False: "vllm.v1.core.sched.scheduler.Scheduler",
    True: "vllm.v1.core.sched.async_scheduler.AsyncScheduler",
}
OVERLAP = "overlap"
OURS = "penstock.plugins.vllm.request_scheduler.make_scheduler"
SECTION = {"penstock": {"scheduler": {"policy": "dlpm", "quantum_tokens": 400}}}
TARGETS = {"default_ttft_slo_ms": 60_000.0, "default_tpot_slo_ms": 2_000.0, "slo": {"longest_step_s": 60.0}}
PLANNED = {"penstock": {"scheduler": {"policy": "slo", **TARGETS}}}
POLICIES: dict[str, dict[str, Any]] = {"fcfs": {}, "dlpm": SECTION, "slo": PLANNED}
"""With the section that asks for ours, or without one."""

Rows = list[tuple[str, int, int]]


@dataclass
class Record:
    """What each step computed, as (request, first position, tokens), and whom it preempted; and how many were
    laid out while the step before was computed."""

    steps: list[Rows] = field(default_factory=list)
    preempted: list[list[str]] = field(default_factory=list)
    laid_out: int = 0

    def note(self, rows: Rows, preempted: list[str]) -> None:
        """One step; those that compute nothing are not written down."""
        if rows:
            self.steps.append(rows)
            self.preempted.append(preempted)

    @property
    def admissions(self) -> list[str]:
        """Requests in the order in which they were scheduled first."""
        return list(dict.fromkeys(name for rows in self.steps for name, _, _ in rows))


def trace() -> list[Ask]:
    """60 requests in 40 steps, three quarters from one client, on more documents than the cache can hold."""
    rng = random.Random(7)
    documents = {client: [Piece(10 * n + 10 + k, 200) for k in range(4)] for n, client in enumerate("ab")}
    asks = []
    for number in range(60):
        client = "b" if number % 4 == 0 else "a"
        prompt = (rng.choice(documents[client]), Piece(100 + number, rng.randrange(5, 120)))
        asks.append(
            Ask(
                request_id=f"{client}{number}",
                arrival_s=float(number * 2 // 3),
                prompt=prompt,
                output_tokens=rng.randrange(1, 48),
                answer=1000 + number,
                client=client,
            )
        )
    return asks


def shape(policy: str, overlap: bool) -> EngineShape:
    """Chunked prefill, six requests at once, and a KV cache in which those do not always find room."""
    from penstock.simulation.vllm_engine import EngineShape

    return EngineShape(
        kv_tokens=32 * 24,
        max_model_len=512,
        max_num_batched_tokens=128,
        max_num_seqs=6,
        block_size=32,
        async_scheduling=overlap,
        additional_config=POLICIES[policy],
    )


def count_laid_out(scheduler: Any, record: Record) -> None:
    """Count the plans of the SLO policy that were laid out before their step."""
    planner = getattr(scheduler, "planner", None)
    if planner is None:
        return

    def counting(method: Any) -> Any:
        def counted(*args: Any) -> Any:
            plan = method(*args)
            record.laid_out += plan is not None
            return plan

        return counted

    planner.complete = counting(planner.complete)


class NotedEngine:
    """The simulated engine, its steps written down."""

    def __init__(self, engine: VllmEngine, record: Record) -> None:
        self._engine, self._record = engine, record

    def add(self, ask: Ask) -> None:
        self._engine.add(ask)

    def schedule(self) -> Batch:
        batch = self._engine.schedule()
        self._record.note([tuple(row) for row in batch.rows], list(batch.preempted))
        return batch

    def complete(self, batch: Batch) -> list[Progress]:
        return self._engine.complete(batch)

    def describe(self) -> str:
        return self._engine.describe()


def scheduler_factory(policy: str, overlap: bool, clock: VirtualClock) -> Any:
    """The policy's scheduler; one of ours reads ``clock``."""
    from penstock.simulation.vllm_engine import resolve

    return partial(resolve(OURS), clock=clock) if POLICIES[policy] else resolve(STOCK[overlap])


def simulated(policy: str, overlap: bool) -> Record:
    """The trace in the simulation, a second a step."""
    from penstock.simulation.vllm_engine import VllmEngine

    clock, record = VirtualClock(), Record()
    made = scheduler_factory(policy, overlap, clock)
    engine = NotedEngine(VllmEngine(shape(policy, overlap), made), record)
    Simulation(engine, Fixed(trace()), lambda _: 1.0, clock, overlap=overlap).run()
    return record


GIVEN: dict[str, Any] = {}
"""What the engine core passes to its scheduler."""


def first_scheduler(**given: Any) -> Any:
    """The scheduler that the engine core starts with; another takes its place before the first request."""
    from vllm.v1.core.sched.scheduler import Scheduler

    GIVEN.update(given)
    return Scheduler(**given)


class RealEngine:
    """One engine core in this process, whose scheduler is made anew for every policy."""

    def __init__(self, model: str, overlap: bool) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor import Executor

        self._overlap = overlap
        size = shape("fcfs", overlap)
        config = EngineArgs(
            model=model,
            max_model_len=size.max_model_len,
            max_num_batched_tokens=size.max_num_batched_tokens,
            max_num_seqs=size.max_num_seqs,
            block_size=size.block_size,
            num_gpu_blocks_override=size.num_blocks,
            gpu_memory_utilization=0.25,
            enforce_eager=True,
            async_scheduling=overlap,
            enable_prefix_caching=True,
        ).create_engine_config()
        # The CPU platform turns it off whatever is asked for; the runner itself can do it.
        config.scheduler_config.async_scheduling = overlap
        config.scheduler_config.scheduler_cls = first_scheduler
        self._core: EngineCore = EngineCore(config, Executor.get_class(config), log_stats=False)
        assert (self._core.batch_queue is not None) == overlap

    def run(self, policy: str) -> Record:
        """The trace under a policy, from an empty prefix cache."""
        clock, record = VirtualClock(), Record()
        GIVEN["vllm_config"].additional_config = POLICIES[policy]
        make = scheduler_factory(policy, self._overlap, clock)
        self._core.scheduler = scheduler = make(**GIVEN)
        count_laid_out(scheduler, record)
        coming = trace()
        while coming or scheduler.has_requests() or self._core.batch_queue:
            while coming and coming[0].arrival_s <= clock():
                self._core.add_request(self._request(coming.pop(0)))
            if self._noting(record):
                clock.advance_to(clock() + 1)
        return record

    def _request(self, ask: Ask) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        from penstock.simulation.vllm_engine import extra_args

        return Request(
            ask.request_id,
            [piece.key for piece in ask.prompt for _ in range(piece.tokens)],
            SamplingParams(
                max_tokens=ask.output_tokens, ignore_eos=True, temperature=0.0, extra_args=extra_args(ask)
            ),
            None,
            arrival_time=ask.arrival_s,
            block_hasher=self._core.request_block_hasher,
        )

    def _noting(self, record: Record) -> bool:
        """One turn of the engine core, and what its scheduler chose; whether a step came back."""
        scheduler = self._core.scheduler
        chosen, updated = scheduler.schedule, scheduler.update_from_output
        came_back = False

        def schedule(*args: Any, **more: Any) -> Any:
            output = chosen(*args, **more)
            rows = [
                (name, scheduler.requests[name].num_computed_tokens - tokens, tokens)
                for name, tokens in output.num_scheduled_tokens.items()
            ]
            record.note(rows, sorted(output.preempted_req_ids or ()))
            return output

        def update_from_output(output: Any, *args: Any, **more: Any) -> Any:
            nonlocal came_back
            came_back = output.total_num_scheduled_tokens > 0
            return updated(output, *args, **more)

        scheduler.schedule, scheduler.update_from_output = schedule, update_from_output
        try:
            self._core.step_fn()
        finally:
            del scheduler.schedule, scheduler.update_from_output
        return came_back

    def close(self) -> None:
        """Stop the executor."""
        self._core.shutdown()


def main(model: str, result: Path, overlap: bool) -> None:
    """All policies, one after the other."""
    engine = RealEngine(model, overlap)
    try:
        found = {policy: vars(engine.run(policy)) for policy in POLICIES}
    finally:
        engine.close()
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), OVERLAP in sys.argv[3:])
