"""Requests as the SLO planner sees them, kept up to date beside SGLang's own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from penstock.schedulers.asking import Asking
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.slo.attainment import TOLERANCE
from penstock.schedulers.slo.records import Record, class_of, targets_of
from penstock.schedulers.slo.requests import Running, Waiting
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

LONGEST_ON_THE_WAY_S = 60.0
"""A request that seems to have been longer on its way from the front end comes from another clock."""


class Records:
    """Opens a record when a request is first seen and brings it up to date when it is planned.

    ``clock`` is the planner's; ``front_clock`` the one that SGLang's front end stamps arrivals with, None
    where ranks must agree: each process converts those stamps by a reckoning of its own.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        asking_of: Callable[[Req], Asking],
        clock: Clock,
        front_clock: Clock | None = time.perf_counter,
    ) -> None:
        self._config = config
        self._asking_of = asking_of
        self._clock = clock
        self._front_clock = front_clock
        self._live: dict[Req, Record] = {}
        self._in_time_until_s = -math.inf
        """No token of a request that decodes is due before."""
        self.with_targets = 0
        """How many live requests have targets."""

    def __len__(self) -> int:
        return len(self._live)

    def of(self, request: Req) -> Record:
        """The request's record, opened when it is first seen."""
        record = self._live.get(request)
        return self._open(request) if record is None else record

    def _open(self, request: Req) -> Record:
        asking = self._asking_of(request)
        targets = targets_of(asking, self._config)
        stamp_s, on_the_way = request.time_stats.created_time, 0.0
        if stamp_s and self._front_clock is not None:
            on_the_way = self._front_clock() - stamp_s
        if not 0 <= on_the_way <= LONGEST_ON_THE_WAY_S:
            on_the_way = 0.0
        running = Running(
            request_id=request.rid,
            arrival_s=self._clock() - on_the_way,
            tokens=len(request.origin_input_ids),
            computed_tokens=0,
            max_output_tokens=request.sampling_params.max_new_tokens,
            targets=targets,
            class_name=class_of(asking.client, targets),
        )
        self._live[request] = record = Record(running, asking.client, asking.weight)
        self.with_targets += targets is not None
        return record

    def close(self, request: Req) -> Record | None:
        """Forget a request and return its record."""
        record = self._live.pop(request, None)
        if record is not None:
            self.with_targets -= record.running.targets is not None
        return record

    def beside(self, requests: Collection[Req]) -> list[Req]:
        """Requests with a record that are none of these."""
        return [request for request in self._live if request not in requests]

    def waiting(self, request: Req, cached_tokens: int) -> Waiting:
        """A request that waits. One that was retracted has generated tokens among those to compute."""
        record = self.of(request)
        running = record.running
        return Waiting(
            request_id=request.rid,
            client=record.client,
            tokens=len(request.origin_input_ids) + len(request.output_ids),
            arrival_s=running.arrival_s,
            weight=record.weight,
            targets=running.targets,
            class_name=running.class_name,
            cached_tokens=cached_tokens,
            output_tokens=len(request.output_ids),
            max_output_tokens=request.sampling_params.max_new_tokens,
            first_token_s=running.first_token_s,
        )

    def decoding(self, requests: Iterable[Req], in_flight: Collection[Req]) -> list[Running]:
        """Requests of the running batch as they are for the next pass, less those that have ended. A token
        that is in flight counts as generated; it may be a request's last."""
        found: list[Running] = []
        for request in requests:
            if request.finished():
                continue
            running = self.of(request).running
            generated = len(request.output_ids) + (request in in_flight)
            running.tokens = len(request.origin_input_ids) + generated
            running.computed_tokens = running.tokens - 1
            running.output_tokens = generated
            found.append(running)
        return found

    def chunked(self, request: Req) -> Running:
        """The request whose prompt is being computed in chunks."""
        running = self.of(request).running
        running.output_tokens = len(request.output_ids)
        running.tokens = len(request.origin_input_ids) + running.output_tokens
        running.computed_tokens = min(request.extend_end, running.tokens - 1)
        return running

    def produced(self, requests: Iterable[Req], now_s: float, *, everyone: bool) -> None:
        """Note the tokens that a pass gave to requests at ``now_s``, one to each.

        Where it gave one to ``everyone`` that decodes, and their columns say so, none is looked at before a
        token can have missed its deadline.
        """
        if everyone and now_s <= self._in_time_until_s:
            return
        next_s = math.inf
        for request in requests:
            record = self._live.get(request)
            generated = len(request.output_ids)
            if record is not None and generated > record.seen:
                # Those before that were not noted came in time.
                due_s = record.note(generated, now_s, TOLERANCE, first_new=generated - 1)
                next_s = min(next_s, due_s)
        self._in_time_until_s = next_s if everyone else min(next_s, self._in_time_until_s)

    def caught_up(self, request: Req) -> None:
        """The tokens that a request has came in time where they were not noted."""
        if (record := self._live.get(request)) is not None:
            record.seen = len(request.output_ids)

    def check_integrity(self, live: Collection[Req]) -> None:
        """Assert that no record outlives its request and that the count of targets holds."""
        assert self._live.keys() <= set(live)
        targets = (record.running.targets for record in self._live.values())
        assert self.with_targets == sum(one is not None for one in targets)
