"""Requests as the SLO planner sees them, kept up to date beside vLLM's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from penstock.schedulers.asking import Asking
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.slo.attainment import TOLERANCE
from penstock.schedulers.slo.records import Record, class_of, targets_of
from penstock.schedulers.slo.requests import Running, Waiting
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from vllm.v1.request import Request

LONGEST_ON_THE_WAY_S = 60.0
"""A request that seems to have been longer on its way from the front end comes from another clock."""


class Records:
    """Opens a record when a request is first seen and brings it up to date when it is planned.

    ``clock`` is the planner's; ``wall_clock`` the one that the front end stamps arrivals with.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        asking_of: Callable[[Request], Asking],
        clock: Clock,
        wall_clock: Clock,
        drafts: int,
    ) -> None:
        self._config = config
        self._asking_of = asking_of
        self._clock = clock
        self._wall_clock = wall_clock
        self._sampled = 1 + drafts
        self._live: dict[str, Record] = {}
        self._decoding: set[str] = set()
        self._begun: set[str] = set()
        self._noted = True
        self._in_time_until_s = -math.inf
        self.with_targets = 0
        """How many live requests have targets."""
        self.prompts = 0
        """How many of those that ``running`` returned last have more than one token to compute."""

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._live

    def of(self, request: Request) -> Record:
        """The request's record; a new one at its arrival and at each further turn of a session."""
        record = self._live.get(request.request_id)
        if record is None or record.arrived != request.arrival_time:
            self.close(request.request_id)
            record = self._open(request)
        return record

    def _open(self, request: Request) -> Record:
        asking = self._asking_of(request)
        targets = targets_of(asking, self._config)
        on_the_way = self._wall_clock() - request.arrival_time
        if not 0 <= on_the_way <= LONGEST_ON_THE_WAY_S:
            on_the_way = 0.0
        running = Running(
            request_id=request.request_id,
            arrival_s=self._clock() - on_the_way,
            tokens=request.num_tokens,
            computed_tokens=request.num_computed_tokens,
            max_output_tokens=request.max_tokens,
            targets=targets,
            class_name=class_of(asking.client, targets),
        )
        record = Record(running, asking.client, asking.weight, arrived=request.arrival_time)
        self._live[request.request_id] = record
        self.with_targets += targets is not None
        return record

    def close(self, request_id: str) -> Record | None:
        """Forget a request and return its record."""
        record = self._live.pop(request_id, None)
        self._decoding.discard(request_id)
        self._begun.discard(request_id)
        if record is not None:
            self.with_targets -= record.running.targets is not None
        return record

    def waiting(self, request: Request, cached_tokens: int) -> Waiting:
        """A request that waits. One that was preempted has generated tokens among those to compute."""
        record = self.of(request)
        running = record.running
        return Waiting(
            request_id=request.request_id,
            client=record.client,
            tokens=request.num_tokens,
            arrival_s=running.arrival_s,
            weight=record.weight,
            targets=running.targets,
            class_name=running.class_name,
            cached_tokens=cached_tokens,
            output_tokens=request.num_output_tokens,
            max_output_tokens=request.max_tokens,
            first_token_s=running.first_token_s,
        )

    def running(
        self, requests: Iterable[Request], output_s: float, comes_back_s: float | None = None
    ) -> list[Running]:
        """Requests of the running batch that can take part in the next step; the last one came back at
        ``output_s``. With ``comes_back_s``, as they will be when the step in flight comes back then.

        Tokens that a step in flight will sample count as generated; a request whose last token is in flight
        is left out, as vLLM does.
        """
        found: list[Running] = []
        live, decoding, drafting = self._live, self._decoding, self._sampled > 1
        all_served = not self._noted
        prompts = 0
        for request in requests:
            name = request.request_id
            running = (live.get(name) or self.of(request)).running
            known, prompt = request.num_tokens, request.num_prompt_tokens
            computed = request.num_computed_tokens
            in_flight = request.num_output_placeholders
            if comes_back_s is not None and not in_flight:
                # Without overlap vLLM keeps no count: the step that computes all tokens samples one.
                in_flight = int(computed >= known)
            if in_flight:
                last = known + in_flight - prompt >= request.max_tokens
                if last if comes_back_s is not None else ends_in_flight(request):
                    continue
                sampled = -(-in_flight // self._sampled) if drafting else in_flight
                running.output_tokens = known + sampled - prompt
            else:
                running.output_tokens = known - prompt
            running.tokens = known + in_flight
            running.computed_tokens = computed
            if drafting:
                running.draft_tokens = len(request.spec_token_ids)
            if known - computed > 1:
                prompts += 1
                decoding.discard(name)
            else:
                if running.first_token_s is not None:
                    if in_flight and comes_back_s is not None:
                        running.last_token_s = comes_back_s
                    elif all_served:
                        running.last_token_s = output_s
                if name not in decoding and running.targets is not None and running.decodes:
                    decoding.add(name)
            found.append(running)
        self.prompts = prompts
        return found

    def all_decode(self, requests: Sequence[Request]) -> bool:
        """Whether ``running`` saw each decode under targets of its own, and none was set back since."""
        return self._decoding.issuperset([request.request_id for request in requests])

    def preempted(self, request_id: str) -> None:
        """A request has a prompt to compute again."""
        self._decoding.discard(request_id)

    def look_again(self) -> None:
        """Something came otherwise than it was planned: take nobody's state for granted."""
        self._decoding.clear()

    def produced(
        self, requests: Mapping[str, Request], served: Iterable[str], now_s: float, *, everyone: bool
    ) -> None:
        """Note the tokens that a step gave to those ``served`` at ``now_s``.

        Where ``everyone`` in the running batch was served and none can have missed its deadline, only first
        tokens are: ``running`` says when the others had theirs, and ``catch_up`` notes them before anybody is
        passed over.
        """
        if everyone and now_s <= self._in_time_until_s:
            begun = self._begun
            served = () if begun.issuperset(served) else [name for name in served if name not in begun]
            self._noted = False
        else:
            self._noted = True
        whole = everyone and self._noted
        in_time_s = self._note([requests[name] for name in served if name in requests], now_s)
        self._in_time_until_s = in_time_s if whole else min(in_time_s, self._in_time_until_s)

    def catch_up(self, requests: Iterable[Request], now_s: float) -> None:
        """Note what steps gave that was not noted to ``requests``, all that run; the last one came back at
        ``now_s``."""
        if not self._noted:
            self._in_time_until_s = self._note(requests, now_s)
            self._noted = True

    def note_last(self, record: Record, request: Request, now_s: float) -> None:
        """Note the last tokens of a request whose record is closed."""
        self._note_one(record, request, now_s)

    def _note(self, requests: Iterable[Request], now_s: float) -> float:
        """Hold the first token that came at ``now_s`` to its deadline, for each of ``requests``. Returns the
        earliest deadline of a token that comes next."""
        live = self._live
        next_s = math.inf
        for request in requests:
            record = live.get(request.request_id)
            if record is not None and request.num_output_tokens > record.seen:
                if record.running.first_token_s is None:
                    self._begun.add(request.request_id)
                next_s = min(next_s, self._note_one(record, request, now_s))
        return next_s

    def _note_one(self, record: Record, request: Request, now_s: float) -> float:
        """Note the tokens that one got, if any; returns when the next is due."""
        index, seen = request.num_output_tokens, record.seen
        if index <= seen:
            return math.inf
        # Without drafts tokens come one by one: those before the last one came earlier, and in time.
        first_new = seen if self._sampled > 1 else index - 1
        return record.note(index, now_s, TOLERANCE, first_new=first_new)

    def check_integrity(self, live: Sequence[str]) -> None:
        """Assert that no record outlives its request and that the count of targets holds."""
        assert self._live.keys() <= set(live)
        assert self._decoding | self._begun <= self._live.keys()
        targets = (record.running.targets for record in self._live.values())
        assert self.with_targets == sum(one is not None for one in targets)


def ends_in_flight(request: Request) -> bool:
    """Whether a step in flight samples the request's last token; vLLM passes it over then."""
    sampled = request.num_computed_tokens + 2 - request.num_output_placeholders
    return bool(sampled >= request.num_prompt_tokens + request.max_tokens)
