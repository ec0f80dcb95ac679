"""vLLM's queue of waiting requests over the SLO planner's backlog."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        super().__init__(planner.backlog, job_of, lambda request: None, before_picks)
        self._planner = planner
        self._waiting_of = job_of

    def add_request(self, request: Request) -> None:
        """A request arrives."""
        self._planner.arrive(self._waiting_of(request))
        self._requests[request.request_id] = request

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take out those of ``requests`` that wait here. One that was preempted with its last token in flight
        ends first, and the planner has forgotten it then."""
        for request in requests:
            if self._requests.pop(request.request_id, None) is not None and request.request_id in self.order:
                self.order.remove(request.request_id)
