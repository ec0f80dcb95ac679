"""vLLM's queue of waiting requests over an order that is charged for whom it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from penstock.plugins.vllm.charging import Charges
from penstock.plugins.vllm.later import Later
from penstock.plugins.vllm.request_queue import OrderedQueue
from penstock.schedulers.waiting import WaitingOrder

if TYPE_CHECKING:
    from vllm.v1.request import Request


SHORT_LINE = 64
"""Where no more wait, who just came may well be next, and so may a client of which a request just ended."""


class ChargedQueue(OrderedQueue):
    """An ``OrderedQueue`` of which every pop is an admission, which is charged, or a request passed over.

    What a pop changes in the order, and its charge, are put off: whoever looks at the order next, be it for
    the second pick of a step, finds both done. A step that admits one request is spared them. Nobody stands
    at the door of a short line.
    """

    def __init__(
        self, order: WaitingOrder, charges: Charges, later: Later, before_picks: Callable[[], None]
    ) -> None:
        super().__init__(order, charges.job_of, before_picks)
        self._charges = charges
        self._later = later
        self._unheard = 0
        """Pops that the order has not heard of."""

    @property
    def order(self) -> WaitingOrder:
        """The order of those who wait behind the door."""
        if self._unheard:
            self._later.do()
        return self._order

    @property
    def is_short(self) -> bool:
        """Whether whatever happened since the last step may change who is next."""
        return len(self._requests) <= SHORT_LINE

    def add_request(self, request: Request) -> None:
        """A request arrives, or the next turn of a session."""
        super().add_request(request)
        if self.is_short:
            self.join()

    def join(self) -> None:
        """All arrivals stand in line from now on. One may bear the id of a request whose end was put off."""
        if self.arrivals:
            self._later.do()
        super().join()

    def pop_request(self) -> Request:
        """Take out what ``peek_request`` shows. Raises IndexError if none waits."""
        request = self.peek_request()
        del self._requests[request.request_id]
        self._unheard += 1
        self._later.put(self._pop, request.request_id)
        self._charges.popped(request)
        return request

    def _pop(self, request_id: str) -> None:
        self._unheard -= 1
        job = self._order.pop()
        assert job.request_id == request_id, (job, request_id)

    def _put_back(self, request: Request, *, preempted: bool) -> None:
        # What it was computed in the step before may not be charged yet.
        self._later.do()
        super()._put_back(request, preempted=preempted)
