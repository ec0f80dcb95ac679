"""vLLM's queue of waiting requests, in the order of a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import RequestStatus

from penstock.schedulers.waiting import Job, WaitingOrder

if TYPE_CHECKING:
    from vllm.v1.request import Request


class OrderedQueue(RequestQueue):
    """A ``RequestQueue`` over a ``WaitingOrder``, with the guarantees that ``Scheduler.schedule`` relies on.

    ``pop_request`` takes out what ``peek_request`` showed. ``prepend_request`` is how the scheduler returns a
    preempted request, ``prepend_requests`` how it returns those that it passed over in the same step, last
    one first; among requests that name no client both give vLLM's own order.

    Who arrives waits at the door until ``join``, or until nobody else waits: where the line is long, no step
    needs to know of a newcomer at once.

    ``job_of`` describes a request to the order. ``before_picks`` is called before the first ``peek`` of a
    step: a step that has no seat or no token left looks at nobody.
    """

    def __init__(
        self,
        order: WaitingOrder,
        job_of: Callable[[Request], Job],
        before_picks: Callable[[], None],
    ) -> None:
        self._order = order
        self._job_of = job_of
        self._before_picks = before_picks
        self._step_begins = True
        self._requests: dict[str, Request] = {}
        self.arrivals: dict[str, Request] = {}
        """Those at the door, by id, the first that came first."""

    @property
    def order(self) -> WaitingOrder:
        """The order of those who wait behind the door."""
        return self._order

    def join(self) -> None:
        """All arrivals stand in line from now on."""
        while self.arrivals:
            self._enter(self.arrivals.pop(next(iter(self.arrivals))))

    def begin_step(self) -> None:
        """A scheduling step begins."""
        self._step_begins = True

    def get(self, request_id: str) -> Request:
        """A waiting request. Raises KeyError if it does not wait."""
        return self._requests[request_id]

    def add_request(self, request: Request) -> None:
        """A request arrives, or the next turn of a session. One that was preempted with the last token of its
        turn in flight waits here already when that token comes."""
        self.remove_requests((request,))
        self.arrivals[request.request_id] = self._requests[request.request_id] = request

    def peek_request(self) -> Request:
        """The request to serve next. Raises IndexError if none waits."""
        if self._step_begins:
            self._step_begins = False
            self._before_picks()
        if not self.order:
            self.join()
        return self._requests[self.order.peek().request_id]

    def pop_request(self) -> Request:
        """Take out what ``peek_request`` shows. Raises IndexError if none waits."""
        return self._requests.pop(self.order.pop().request_id)

    def prepend_request(self, request: Request) -> None:
        """A preempted request waits again."""
        self._put_back(request, preempted=True)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Requests that this step passed over wait again; each goes before those put back before it."""
        for request in requests:
            # One that was preempted earlier and cannot go on yet keeps its place before its client's others.
            self._put_back(request, preempted=request.status == RequestStatus.PREEMPTED)

    def remove_request(self, request: Request) -> None:
        """Take out a request. Raises ValueError if it does not wait, as vLLM's queues do."""
        if request.request_id not in self._requests:
            raise ValueError(f"{request.request_id} does not wait")
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take out those of ``requests`` that wait here."""
        for request in requests:
            name = request.request_id
            if self._requests.pop(name, None) is not None and self.arrivals.pop(name, None) is None:
                self._leave(name)

    def _enter(self, request: Request) -> None:
        self.order.add(self._job_of(request))

    def _leave(self, request_id: str) -> None:
        self.order.remove(request_id)

    def _put_back(self, request: Request, *, preempted: bool) -> None:
        self.order.put_back(self._job_of(request), preempted=preempted)
        self._requests[request.request_id] = request

    def __bool__(self) -> bool:
        return bool(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        self.join()
        return (self._requests[job.request_id] for job in self.order)

    def check_integrity(self) -> None:
        """Assert that queue and order hold the same requests."""
        self.join()
        assert len(self.order) == len(self._requests)
        assert {job.request_id for job in self.order} == self._requests.keys()
        if self._requests:
            assert self.order.peek() is self.order.peek()
