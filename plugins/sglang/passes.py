"""SGLang's waiting list in the order of a policy, and what each request has paid for.

SGLang walks its list of waiting requests once in a pass and stops where the batch is full. A ``WaitingOrder``
is asked for one request at a time, and told what the last one cost before it says which is next. Both are
kept: the walk takes its requests from the order as it goes, and what it passed over waits again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from penstock.schedulers import bills
from penstock.schedulers.asking import NOTHING_ASKED, Asking
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

    Generated tokens are charged when a pass begins, where ``answers`` says that they are this server's to
    charge. Until then a request that has ended is remembered.
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
        self._clock = clock
        self._asking_of = asking_of
        self._answers = answers
        self._bills: dict[str, Bill] = {}
        self._waiting: set[Req] = set()
        self._running: dict[str, Bill] = {}
        self._picked: list[Bill] = []

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

    def begin(self, queue: Collection[Req]) -> None:
        """A pass over ``queue`` begins: who came and who left since the last one, and what was generated.
        What waits unchanged costs a place in a set."""
        self._return_rest()
        self.settle()
        here = set(queue)
        for request in self._waiting - here:
            self._forget(self._bills[request.rid])
        if not here <= self._waiting:
            for request in [request for request in queue if request not in self._waiting]:
                self._enter(request)
        self.order.begin_step()

    def picks(self) -> Iterator[Req]:
        """The waiting requests, the next one chosen when it is asked for. Those that are not admitted wait
        again when the walk ends, before it has ended or at its end."""
        try:
            while len(self.order):
                bill = self._bills[self.order.pop().request_id]
                self._picked.append(bill)
                yield bill.request
        finally:
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
            self._waiting.discard(request)
            self._running[request.rid] = bill
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

    def _reserve(self, bill: Bill) -> None:
        if self._answers():
            self._cashier.reserve(bill, bill.request.sampling_params.max_new_tokens)

    def _return_rest(self) -> None:
        while self._picked:
            bill = self._picked.pop()
            if not bill.admitted:
                self.order.put_back(self._job(bill), preempted=bill.retracted)

    def _forget(self, bill: Bill) -> None:
        request_id = bill.request.rid
        if bill.request in self._waiting:
            self._waiting.discard(bill.request)
            self.order.remove(request_id)
        self._running.pop(request_id, None)
        del self._bills[request_id]
        self._cashier.close(bill)

    def _enter(self, request: Req) -> None:
        bill = self._bills.get(request.rid)
        if bill is not None and bill.request is not request:
            # The name of one that has gone, used again.
            self._forget(bill)
            bill = None
        self._waiting.add(request)
        if bill is None:
            self.order.add(self._job(self._open(request)))
            return
        # Thrown out of the running batch. Stock sends it to the end of the line, which stands for requests
        # without a client; a client's own goes before what the client has waiting.
        del self._running[request.rid]
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

    def settle(self) -> None:
        """Charge what was generated since it was charged last, and forget who has ended."""
        if self._answers():
            self._cashier.output((bill, len(bill.request.output_ids)) for bill in self._running.values())
        for bill in [bill for bill in self._running.values() if bill.request.finished()]:
            self._forget(bill)

    def check_integrity(self, queue: Iterable[Req]) -> None:
        """Assert that outside a pass the order holds the queue alone, and that every bill is in one place."""
        assert self._waiting == set(queue)
        assert {job.request_id for job in self.order} == {request.rid for request in queue}
        assert {bill.request for bill in self._bills.values() if not bill.admitted} == self._waiting
        assert self._running == {rid: bill for rid, bill in self._bills.items() if bill.admitted}


class PassList(list["Req"]):
    """A list that its next walk goes through by ``picks``; whoever walks it later sees a plain list."""

    def __init__(self, requests: Iterable[Req], picks: Callable[[], Iterator[Req]]) -> None:
        super().__init__(requests)
        self._picks: Callable[[], Iterator[Req]] | None = picks

    def __iter__(self) -> Iterator[Req]:
        picks, self._picks = self._picks, None
        return super().__iter__() if picks is None else picks()
