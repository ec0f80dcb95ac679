"""SGLang's waiting list in the order of a policy, and what each request has paid for.

SGLang walks its list of waiting requests once in a pass and stops where the batch is full. A ``WaitingOrder``
is asked for one request at a time, and told what the last one cost before it says which is next. Both are
kept: the walk takes its requests from the order as it goes, and what it passed over waits again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from penstock.plugins.sglang.queue_watch import QueueWatch
from penstock.schedulers import bills
from penstock.schedulers.asking import NOTHING_ASKED, Asking
from penstock.schedulers.tabs import Tabs
from penstock.schedulers.waiting import UNNAMED, Clock, Job, WaitingOrder

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


@dataclass(slots=True, kw_only=True)
class Bill(bills.Bill):
    """``admitted`` says that the request left the queue for a batch, ``retracted`` that it was thrown out of
    one and goes before its client's others."""

    request: Req
    admitted: bool = False
    retracted: bool = False


class Passes:
    """The waiting requests of a scheduler, told apart by ``rid``, and the bills of all that live.

    What was generated before a pass counts in it, where ``answers`` says that it is this server's to charge.
    A request that has ended is remembered until the next pass.
    """

    def __init__(
        self,
        order: WaitingOrder,
        clock: Clock,
        asking_of: Callable[[Req], Asking],
        answers: Callable[[], bool] = lambda: True,
    ) -> None:
        self.order = order
        self._cashier = bills.Cashier(order)
        self._tabs = Tabs(order, self._cashier, self._generated)
        self._clock = clock
        self._asking_of = asking_of
        self._answers = answers
        self._bills: dict[str, Bill] = {}
        self._queue = QueueWatch()
        self._running: dict[str, Bill] = {}
        self._offered: Bill | None = None
        self._passed_over: list[Bill] = []

    def __len__(self) -> int:
        return len(self._bills)

    def request(self, request_id: str) -> Req:
        """A live request. Raises KeyError."""
        return self._bills[request_id].request

    def held(self, requests: Iterable[Req]) -> list[float]:
        """What each client holds in memory if of its requests those up to here are kept, in tokens by its
        share, for each of ``requests``, the one to keep first at the start."""
        return [after for _, after in self._holdings(requests)]

    def held_before(self, requests: Iterable[Req]) -> list[float]:
        """The same without the request itself."""
        return [before for before, _ in self._holdings(requests)]

    def _holdings(self, requests: Iterable[Req]) -> Iterator[tuple[float, float]]:
        held: dict[str, float] = {}
        for request in requests:
            bill = self._bills.get(request.rid)
            asking = NOTHING_ASKED if bill is None else bill.asking
            tokens = len(request.origin_input_ids) + len(request.output_ids)
            before = held.get(asking.client, 0.0)
            held[asking.client] = after = before + tokens / asking.weight
            yield before, after

    def reweigh(self, client: str, weight: float) -> None:
        """A client has another share from now on, its live requests included. O(requests)."""
        for bill in self._bills.values():
            if bill.asking.client == client:
                bill.asking = replace(bill.asking, weight=weight)
        self.order.reweigh(client, weight)

    def begin(self, queue: list[Req]) -> None:
        """A pass over ``queue`` begins: who came, who left and who ended since the last one."""
        self._offered = None
        self._return_rest()
        self._tabs.begin_step()
        self._forget_ended()
        came, left = self._queue.look(queue)
        for request in left:
            bill = self._bills.get(request.rid)
            if bill is not None and bill.request is request:
                self._forget(bill)
        for request in came:
            self._enter(request)
        self.order.begin_step()

    def picks(self) -> Iterator[Req]:
        """The waiting requests, the next one chosen when it is asked for. Those that are not admitted wait
        again when the walk ends, before it has ended or at its end."""
        try:
            while len(self.order):
                self._offered = bill = self._bills[self.order.peek().request_id]
                yield bill.request
                if not bill.admitted:
                    self.order.pop()
                    self._passed_over.append(bill)
        finally:
            self._offered = None
            self._return_rest()

    def compute(self, request: Req) -> None:
        """The batch that is being made computes positions ``prefix_len`` to ``extend_end`` of a request, its
        first or a later chunk."""
        self.admit(request, request.prefix_len, request.extend_end)

    def admit(self, request: Req, start: int, end: int) -> None:
        """A request has what it waited for, if it had not, and its positions ``start`` to ``end`` are paid
        for."""
        bill = self._bills.get(request.rid)
        if bill is None:
            # Came by no pass: a chunk of a request that another part of SGLang started.
            bill = self._open(request)
        if not bill.admitted:
            if bill is self._offered:
                job = self.order.pop()
                assert job.request_id == request.rid, (job, request.rid)
            self._queue.took(request)
            self._running[request.rid] = bill
            self._tabs.open(request.rid, bill)
            bill.admitted = True
            self._reserve(bill)
        self._cashier.prompt(bill, start, end, len(request.origin_input_ids))

    def pause(self, request: Req) -> None:
        """An admitted request lost its memory and waits for it outside of the order. Saying so again changes
        nothing."""
        if (bill := self._bills.get(request.rid)) is not None:
            bill.retracted = bill.asking.client != UNNAMED
            self._cashier.release(bill)

    def resume(self, request: Req) -> None:
        """One that ``pause`` was told of goes on."""
        if (bill := self._bills.get(request.rid)) is not None:
            self._reserve(bill)

    def was_retracted(self, request: Req) -> bool:
        """Whether a client's request was thrown out before; never of requests without a client."""
        bill = self._bills.get(request.rid)
        return bill is not None and bill.retracted

    def keep(self, live: Collection[Req]) -> None:
        """Forget all others: SGLang gave them up without saying that they ended."""
        for bill in [bill for bill in self._bills.values() if bill.request not in live]:
            self._forget(bill)

    def forget_lost(self) -> None:
        """Forget, after ``begin``, those that hold no memory and do not wait for any: SGLang aborted them
        after they were thrown out, before a pass saw them wait. Where a request may wait for memory
        elsewhere, as on a decode server, ``keep`` says who lives."""
        for bill in [bill for bill in self._running.values() if not bill.request.kv.holds_kv]:
            self._forget(bill)

    def _reserve(self, bill: Bill) -> None:
        if self._answers():
            self._cashier.reserve(bill, bill.request.sampling_params.max_new_tokens)

    def _return_rest(self) -> None:
        while self._passed_over:
            bill = self._passed_over.pop()
            if not bill.admitted:
                self.order.put_back(self._job(bill), preempted=bill.retracted)

    def _forget(self, bill: Bill) -> None:
        request_id = bill.request.rid
        if bill.admitted:
            self._stop(bill)
        else:
            self.order.remove(request_id)
        del self._bills[request_id]
        self._cashier.close(bill)

    def _enter(self, request: Req) -> None:
        bill = self._bills.get(request.rid)
        if bill is not None and bill.request is not request:
            # The name of one that has gone, used again.
            self._forget(bill)
            bill = None
        if bill is None:
            self.order.add(self._job(self._open(request)))
            return
        # Thrown out of the running batch. Stock sends it to the end of the line, which stands for requests
        # without a client; a client's own goes before what the client has waiting.
        self._stop(bill)
        bill.admitted, bill.retracted = False, bill.asking.client != UNNAMED
        self._cashier.release(bill)
        if bill.retracted:
            self.order.put_back(self._job(bill), preempted=True)
        else:
            self.order.add(self._job(bill))

    def _open(self, request: Req) -> Bill:
        bill = Bill(self._asking_of(request), self._clock(), request=request)
        self._bills[request.rid] = bill
        return bill

    def _job(self, bill: Bill) -> Job:
        request = bill.request
        return Job(
            request_id=request.rid,
            client=bill.asking.client,
            tokens=len(request.origin_input_ids) + len(request.output_ids),
            arrival_s=bill.arrival_s,
            weight=bill.asking.weight,
        )

    def _stop(self, bill: Bill) -> None:
        """A request runs no more, for now or for good."""
        del self._running[bill.request.rid]
        self._tabs.close(bill.request.rid, bill)

    def _generated(self, bill: Bill) -> int:
        return len(bill.request.output_ids) if self._answers() else bill.output_paid

    def settle(self) -> None:
        """Charge what was generated since it was charged last, and forget who has ended."""
        self._tabs.begin_step()
        self._tabs.settle(None)
        self._forget_ended()

    def _forget_ended(self) -> None:
        # What ``finished`` says, without a call for each.
        for bill in [bill for bill in self._running.values() if bill.request.finished_reason is not None]:
            self._forget(bill)

    def check_integrity(self, queue: Iterable[Req]) -> None:
        """Assert that outside a pass the order holds the queue alone, and that every bill is in one place."""
        waiting = {bill.request for bill in self._bills.values() if not bill.admitted}
        assert waiting == set(queue) == set(self._queue.waiting())
        assert {job.request_id for job in self.order} == {request.rid for request in queue}
        assert self._running == {rid: bill for rid, bill in self._bills.items() if bill.admitted}


class PassList(list["Req"]):
    """A list that its next walk goes through by ``picks``; whoever walks it later sees a plain list."""

    def __init__(self, requests: Iterable[Req], picks: Callable[[], Iterator[Req]]) -> None:
        super().__init__(requests)
        self._picks: Callable[[], Iterator[Req]] | None = picks

    def __iter__(self) -> Iterator[Req]:
        picks, self._picks = self._picks, None
        return super().__iter__() if picks is None else picks()
