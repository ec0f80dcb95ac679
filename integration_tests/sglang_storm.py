"""A storm over SGLang's real scheduler: whatever may happen to requests, at random, in a run of its own.

``sglang_stepped`` runs an object with ``storm`` (a seed), ``section``, ``shape``, ``requests`` (how many) and
perhaps ``retract_every``. Requests come with clients and targets or without, under names that were used
before, and are aborted wherever they are; passes are paused, with requests thrown out or not, and caches
flushed meanwhile; now and then SGLang throws somebody out. In the end everybody has all tokens or was
aborted, SGLang's own check finds no leak, and the policy remembers nobody.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from sglang.srt.managers.io_struct import AbortReq, ContinueGenerationReqInput, PauseGenerationReqInput

from penstock.benchmarks.sglang_dlpm import on_virtual_clock
from penstock.simulation.engine import VirtualClock
from penstock.simulation.records import Ask, Piece
from penstock.simulation.sglang_engine import EngineShape, SglangEngine

PASS_S = 0.01
MOST_TURNS = 5000
TARGETS_MS = ((None, None), (50, 10), (500, 50), (5000, 300))


class Storm:
    """One scheduler and everything that happens to it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.rng = random.Random(given["storm"])
        self.clock = VirtualClock()
        self.engine = SglangEngine(EngineShape(**given["shape"]), clock=self.clock, prepare=on_virtual_clock)
        self.scheduler = self.engine.scheduler
        # There is nobody to tell.
        self.scheduler.send_abort_output = lambda _, request: self._end(request, aborted=True)
        self.asks: list[Ask] = []
        self.live: dict[str, tuple[Ask, Any]] = {}
        self.counted: Counter[str] = Counter()

    def run(self, requests: int) -> dict[str, int]:
        while len(self.asks) < requests:
            self._happen()
            self._turn()
        self._go_on()
        self._drain()
        # Whom SGLang gave up without a word is noticed when somebody comes.
        self._arrive()
        self._drain()
        self.engine.idle()
        assert self.scheduler.flush_cache(empty_cache=False)
        return dict(self.counted)

    def _happen(self) -> None:
        rng, scheduler = self.rng, self.scheduler
        for _ in range(rng.choice((0, 0, 1, 3))):
            self._arrive()
        if rng.random() < 0.12:
            everybody = rng.random() < 0.05
            scheduler.abort_request(AbortReq(rid=rng.choice([*self.live, "nobody"]), abort_all=everybody))
        if rng.random() < 0.05:
            scheduler.pause_generation(PauseGenerationReqInput(mode=rng.choice(("in_place", "retract"))))
        if scheduler._engine_paused:
            # To return memory to the system takes longer than all the rest.
            self.counted["flushed"] += scheduler.flush_cache(empty_cache=False)
            if rng.random() < 0.4:
                self._go_on()

    def _arrive(self) -> None:
        rng, number = self.rng, len(self.asks)
        gone = [ask.request_id for ask in self.asks if ask.request_id not in self.live]
        ttft_ms, tpot_ms = rng.choice(TARGETS_MS)
        ask = Ask(
            request_id=rng.choice(gone) if gone and rng.random() < 0.2 else f"r{number:04d}.",
            arrival_s=self.clock(),
            prompt=(
                Piece(rng.randrange(4), rng.choice((1, 40, 90))),
                Piece(10**6 + number, rng.randrange(1, 160)),
            ),
            output_tokens=rng.choice((1, 2, rng.randrange(1, 40))),
            answer=2 * 10**6 + number,
            client=rng.choice(("", "a", "b", "c")),
            ttft_slo_ms=ttft_ms,
            tpot_slo_ms=tpot_ms,
        )
        self.asks.append(ask)
        self.engine.add(ask)
        self.live[ask.request_id] = ask, self.scheduler.waiting_queue[-1]

    def _go_on(self) -> None:
        self.scheduler.continue_generation(ContinueGenerationReqInput())

    def _turn(self) -> None:
        if self.scheduler._engine_paused:
            return
        batch = self.engine.schedule()
        self.clock.advance_to(self.clock() + PASS_S)
        self.counted["thrown out"] += len(batch.preempted)
        self.engine.complete(batch)
        for _, request in list(self.live.values()):
            if request.finished():
                self._end(request, aborted=request.finished_reason.to_json()["type"] == "abort")

    def _end(self, request: Any, *, aborted: bool) -> None:
        found = self.live.get(request.rid)
        if found is None or found[1] is not request:
            return
        ask, _ = self.live.pop(request.rid)
        tokens = len(request.output_ids)
        assert len(set(request.output_ids)) <= 1
        assert tokens <= ask.output_tokens if aborted else tokens == ask.output_tokens
        self.counted["aborted" if aborted else "ended"] += 1

    def _drain(self) -> None:
        for _ in range(MOST_TURNS):
            if not self.live:
                return
            self._turn()
        raise AssertionError(f"left: {list(self.live)}, {self.engine.describe()}")


def storm(given: dict[str, Any]) -> dict[str, int]:
    """A run; what happened in it, by its kind, and how many the policy still remembers."""
    weather = Storm(given)
    found = weather.run(given["requests"])
    policy = weather.scheduler.policy
    if hasattr(policy, "records"):
        policy.check_integrity(set())
        return {**found, "left": len(policy.records) + len(policy.planner.backlog)}
    policy.passes.settle()
    policy.passes.check_integrity(())
    return {**found, "left": len(policy.passes)}
