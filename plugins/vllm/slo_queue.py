"""vLLM's queue of waiting requests over the SLO planner's backlog."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from penstock.plugins.vllm.request_queue import OrderedQueue
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.requests import Waiting

if TYPE_CHECKING:
    from vllm.v1.request import Request


class PlannedQueue(OrderedQueue):
    """An ``OrderedQueue`` whose arrivals the planner hears of, since they call for a new decision.

    Who arrives waits at the door until ``join``: where the line is long no step can serve a newcomer at once.
    """

    def __init__(
        self, planner: Planner, job_of: Callable[[Request], Waiting], before_picks: Callable[[], None]
    ) -> None:
        super().__init__(planner.backlog, job_of, lambda request: None, before_picks)
        self._planner = planner
        self._waiting_of = job_of
        self.arrivals: dict[str, Request] = {}
        """Those that the planner has not heard of yet, by id."""

    def join(self) -> None:
        """The planner hears of all arrivals."""
        while self.arrivals:
            self._planner.arrive(self._waiting_of(self.arrivals.pop(next(iter(self.arrivals)))))

    def peek_request(self) -> Request:
        """The request to serve next. Raises IndexError if none waits."""
        if not self.order:
            self.join()
        return super().peek_request()

    def remove_request(self, request: Request) -> None:
        """Take out a request. Raises ValueError if it does not wait, as vLLM's queues do."""
        if self.arrivals.pop(request.request_id, None) is not None:
            del self._requests[request.request_id]
        else:
            super().remove_request(request)

    def _arrive(self, request: Request) -> None:
        self.arrivals[request.request_id] = request

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take out those of ``requests`` that wait here. One that was preempted with its last token in flight
        ends first, and the planner has forgotten it then."""
        for request in requests:
            waits = self._requests.pop(request.request_id, None) is not None
            at_the_door = self.arrivals.pop(request.request_id, None) is not None
            if waits and not at_the_door and request.request_id in self.order:
                self.order.remove(request.request_id)

    def __iter__(self) -> Iterator[Request]:
        self.join()
        return super().__iter__()

    def check_integrity(self) -> None:
        """Assert that queue and order hold the same requests."""
        self.join()
        super().check_integrity()
