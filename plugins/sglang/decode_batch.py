"""The running batch while it decodes under targets, kept so that a pass that goes on reads nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.plugins.sglang.slo_records import Records
from penstock.schedulers.slo.decodes import Columns, Decodes
from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.targets import Pace

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class DecodeBatch:
    """Requests known to decode under targets, in the order in which they run, and what the planner wants to
    know of them under a pace. Tokens that are in flight count.

    SGLang's lists say who is still there: who is retracted or given up is in none of them.
    """

    def __init__(self, pace: Pace, records: Records) -> None:
        self._records = records
        self._decodes = Decodes(pace)
        self._requests: list[Req] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Their ids."""
        return self._decodes.names

    def is_all_of(self, requests: list[Req]) -> bool:
        """Whether these are they, and nobody else."""
        return requests == self._requests

    def others(self, running: list[Req]) -> list[Req]:
        """Who runs and is not known. Who is known and does not run is known no more."""
        self._follow(running)
        number = len(self._requests)
        if running[:number] == self._requests:
            return running[number:]
        known = set(self._requests)
        return [request for request in running if request not in known]

    def join(self, others: list[Req], records: list[Running], running: list[Req]) -> None:
        """``others`` decode, too; ``records`` say how far they are, and ``running`` where they stand."""
        self._decodes.join(records)
        self._requests += others
        self._follow(running)

    def launched(self, requests: list[Req]) -> None:
        """A pass that gives each of ``requests`` that decodes its next token was handed to the model."""
        if self._requests:
            self._follow(requests)
            self._decodes.went_on(1)

    def came_back(self, requests: list[Req], output_s: float, *, prompts_alone: bool) -> None:
        """The tokens of a pass came. It served all, or ``prompts_alone``: who was in that and is known joined
        while it ran."""
        if not prompts_alone:
            self._decodes.came_back(output_s)
            return
        served = set(requests)
        if places := [place for place, one in enumerate(self._requests) if one in served]:
            self._decodes.came_back(output_s, places)

    def left(self, request: Req) -> None:
        """A request is gone."""
        names = self.names
        place = names.index(request.rid) if request.rid in names else -1
        if place >= 0 and self._requests[place] is request:
            del self._requests[place]
            self._decodes.leave(place)

    def columns(self) -> Columns:
        """Those who have a token to come."""
        return self._decodes.columns()

    def _follow(self, requests: list[Req]) -> None:
        """Keep those who are among ``requests``, in their order."""
        if requests[: len(self._requests)] == self._requests:
            return
        places = {request: place for place, request in enumerate(self._requests)}
        kept = [places.pop(request) for request in requests if request in places]
        self._decodes.keep(kept)
        for request in places:
            self._records.caught_up(request)
        self._requests = [self._requests[place] for place in kept]

    def check_integrity(self, in_flight: set[Req]) -> None:
        """Assert that columns say what requests do."""
        assert self.names == tuple(request.rid for request in self._requests)
        expected = [len(one.output_ids) + (one in in_flight) for one in self._requests]
        assert self._decodes.generated() == expected
