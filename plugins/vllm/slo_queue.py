"""vLLM's queue of waiting requests over the SLO planner's backlog."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from penstock.plugins.vllm.request_queue import OrderedQueue
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.requests import Waiting

if TYPE_CHECKING:
    from vllm.v1.request import Request


class PlannedQueue(OrderedQueue):
    """An ``OrderedQueue`` whose arrivals the planner hears of, since they call for a new decision."""

    def __init__(
        self, planner: Planner, job_of: Callable[[Request], Waiting], before_picks: Callable[[], None]
    ) -> None:
        super().__init__(planner.backlog, job_of, before_picks)
        self._planner = planner
        self._waiting_of = job_of

    def _enter(self, request: Request) -> None:
        self._planner.arrive(self._waiting_of(request))

    def _leave(self, request_id: str) -> None:
        # One that was preempted with its last token in flight ends first, and the planner has forgotten it.
        if request_id in self.order:
            super()._leave(request_id)
