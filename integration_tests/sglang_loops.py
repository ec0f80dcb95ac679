"""SGLang's own event loops on a virtual clock: the normal one, and the one whose passes overlap.

``sglang_stepped`` runs an object with ``loop``, ``section``, ``shape`` and ``asks``. A pass takes the time
that the simulation gives it, and begins when the one before has ended; the clock shows that it is over when
the loop takes its result. Written are ``admitted`` (names, in the order of their first pass), ``tokens`` of
each answer, when the first and the last of them came, ``passes``, ``most_in_flight``, what the policy
counted, and how many requests it still remembers.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Any

from penstock.benchmarks.sglang_dlpm import on_virtual_clock
from penstock.simulation.engine import VirtualClock
from penstock.simulation.records import Ask, Piece
from penstock.simulation.sglang_engine import EngineShape, SglangEngine
from penstock.simulation.step_time import Load, load_step_time

STEP_TIME = load_step_time("opt-6.7b-a100")
IDLE_S = 1e-3
MOST_IDLE = 2000


class Loop:
    """One scheduler, whose loop is fed requests and told when its passes are over."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.clock = VirtualClock()
        shape = EngineShape(**given["shape"], overlap=given["loop"] == "overlap")
        prepare = on_virtual_clock if given["section"] else None
        self.engine = SglangEngine(shape, clock=self.clock, prepare=prepare)
        self.scheduler = self.engine.scheduler
        self.coming = [
            (
                arrival_s,
                number,
                Ask(
                    request_id=name,
                    arrival_s=arrival_s,
                    prompt=(Piece(number, prompt),),
                    output_tokens=output,
                    answer=number,
                    ttft_slo_ms=ttft,
                    tpot_slo_ms=tpot,
                ),
            )
            for number, (name, arrival_s, prompt, output, ttft, tpot) in enumerate(given["asks"], 10**6)
        ]
        heapq.heapify(self.coming)
        self.live: dict[str, Any] = {}
        self.admitted: dict[str, None] = {}
        self.came: dict[str, list[float]] = {}
        self.counted: Counter[str] = Counter()
        self._in_flight: list[tuple[Any, float]] = []
        self._free_s = 0.0
        self._idle = 0
        self._launch, self._process = self.scheduler.run_batch, self.scheduler.process_batch_result
        self.scheduler.run_batch = self._launched
        self.scheduler.process_batch_result = self._came_back
        self.scheduler.ingest_requests = self._turn

    def _turn(self) -> list[Any]:
        """A turn of the loop begins: whoever has come by now is there. It is the last if all have ended."""
        if not self._in_flight and self.live:
            # Nothing was launched in the turn before.
            self._idle += 1
            assert self._idle < MOST_IDLE, f"left: {list(self.live)}, {self.engine.describe()}"
            self.clock.advance_to(self.clock() + IDLE_S)
        elif not self.live and not self._in_flight and self.coming:
            self.clock.advance_to(max(self.clock(), self.coming[0][0]))
        while self.coming and self.coming[0][0] <= self.clock():
            ask = heapq.heappop(self.coming)[2]
            self.engine.add(ask)
            self.live[ask.request_id] = self.scheduler.waiting_queue[-1]
        self.scheduler.gracefully_exit = not (self.live or self.coming or self._in_flight)
        return []

    def _launched(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._idle = 0
        self.admitted.update(dict.fromkeys(request.rid for request in batch.reqs))
        seconds = STEP_TIME(_load_of(batch))
        result = self._launch(batch, *args, **kwargs)
        self._free_s = max(self._free_s, self.clock()) + seconds
        self._in_flight.append((result, self._free_s))
        self.counted["passes"] += 1
        self.counted["most_in_flight"] = max(self.counted["most_in_flight"], len(self._in_flight))
        return result

    def _came_back(self, batch: Any, result: Any, *args: Any, **kwargs: Any) -> None:
        launched, end_s = self._in_flight.pop(0)
        assert launched is result, "results come back in the order of their passes"
        self.clock.advance_to(max(self.clock(), end_s))
        self._process(batch, result, *args, **kwargs)
        for request in batch.reqs:
            came = self.came.setdefault(request.rid, [])
            came += [self.clock()] * (len(request.output_ids) - len(came))
            if request.finished() and self.live.get(request.rid) is request:
                del self.live[request.rid]


def _load_of(batch: Any) -> Load:
    """What a batch computes."""
    requests = len(batch.reqs)
    if batch.forward_mode.is_decode():
        return Load(0, requests, requests, int(batch.seq_lens.sum()))
    return Load(int(batch.extend_num_tokens), 0, requests, sum(batch.prefix_lens))


def looped(given: dict[str, Any]) -> dict[str, Any]:
    """A run, to its end."""
    loop = Loop(given)
    loop.scheduler.run_event_loop()
    loop.engine.idle()
    policy = loop.scheduler.policy
    policy.check_integrity(set())
    return {
        "admitted": [*loop.admitted],
        "tokens": {name: len(came) for name, came in loop.came.items()},
        "first_s": {name: came[0] for name, came in loop.came.items()},
        "last_s": {name: came[-1] for name, came in loop.came.items()},
        **loop.counted,
        "counted": policy.totals.payload(),
        "left": len(policy.records) + len(policy.planner.backlog),
    }
