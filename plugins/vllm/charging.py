"""What each request has paid for: prompt tokens as they are computed, generated tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.schedulers.asking import Asking
from penstock.schedulers.waiting import Clock, Job, WaitingOrder

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class Bill:
    """One live request. ``paid_up_to`` is the furthest prompt position that was ever computed for it, or
    skipped because the prefix cache or a connector had it: a position is charged when it is first passed.
    ``output_paid`` of its generated tokens are charged; ``reserved`` more are expected while it runs.
    ``cached_tokens`` of its prompt were cached when that was looked up last."""

    asking: Asking
    arrival_s: float
    paid_up_to: int = 0
    output_paid: int = 0
    cached_tokens: int = 0
    reserved: int = 0
    job: Job | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Token positions ``start`` to ``end`` of a request that a step computes, and what they cost."""

    start: int
    end: int
    charged: int
    paid_before: int


class Charges:
    """Charges an order for what steps compute, each prompt token once however often it is computed again.

    A request is charged at the moment of its admission, so that the next pick of the same step knows, and
    the charge is settled with what the step in fact computes. Generated tokens are read off the requests, in
    turns: up to ``AT_ONCE`` of those that run are charged in every step, of more an ``EVERY``th part, so that
    what is not charged yet is what ``EVERY`` steps generate.
    """

    AT_ONCE = 16
    EVERY = 16

    def __init__(self, order: WaitingOrder, clock: Clock, asking_of: Callable[[Request], Asking]) -> None:
        self._order = order
        self._clock = clock
        self._asking_of = asking_of
        self._bills: dict[str, Bill] = {}
        self._offered: tuple[str, int, int] | None = None
        self._admitted: dict[str, Span] = {}
        # Left the queue, and have prompt tokens to pay for: few, where all that run are many.
        self._unpaid: set[str] = set()
        self._turn = 0

    def __len__(self) -> int:
        return len(self._bills)

    def of(self, request: Request) -> Bill:
        """The request's bill, opened when it is first seen."""
        bill = self._bills.get(request.request_id)
        if bill is None:
            bill = Bill(self._asking_of(request), self._clock())
            self._bills[request.request_id] = bill
        return bill

    def asking_of(self, request: Request) -> Asking:
        """What the request asks for."""
        return self.of(request).asking

    def job_of(self, request: Request) -> Job:
        """The request as orders see it. Its prompt may have grown since it waited last."""
        bill = self.of(request)
        self._unpaid.discard(request.request_id)
        self.charge_output_of(request)
        self._release(bill)
        if bill.job is None or bill.job.tokens != request.num_tokens:
            bill.job = Job(
                request_id=request.request_id,
                client=bill.asking.client,
                tokens=request.num_tokens,
                arrival_s=bill.arrival_s,
                prefix=request.block_hashes,
                weight=bill.asking.weight,
            )
        return bill.job

    def close(self, request: Request) -> None:
        """The request is over."""
        self.charge_output_of(request)
        bill = self._bills.pop(request.request_id, None)
        self._unpaid.discard(request.request_id)
        if bill is not None:
            self._release(bill)
            self._order.observe_output(bill.asking.client, bill.output_paid)

    def begin_step(self, running: Sequence[Request]) -> None:
        """What was offered in the last step and not taken is off the table; some that run are charged."""
        self._offered = None
        begin = self._turn if self._turn < len(running) else 0
        self._turn = begin + max(self.AT_ONCE, -(-len(running) // self.EVERY))
        self.charge_output(running[begin : self._turn])

    def offer(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> None:
        """A waiting request would be given these tokens, if it is admitted."""
        self._offered = (request.request_id, num_computed_tokens, num_new_tokens)

    def popped(self, request: Request) -> None:
        """A request left the queue: admitted if tokens were offered to it, else passed over or parked."""
        self._unpaid.add(request.request_id)
        if self._offered is None or self._offered[0] != request.request_id:
            return
        _, start, tokens = self._offered
        self._offered = None
        bill = self.of(request)
        before = bill.paid_up_to
        charged = self._extend(bill, start, start + tokens, request.num_prompt_tokens)
        self._admitted[request.request_id] = Span(start, start + tokens, charged, before)
        left = max(0, request.max_tokens - bill.output_paid)
        bill.reserved = self._order.reserve_output(bill.asking.client, bill.output_paid, left)

    def settle(self, scheduled: Mapping[str, int], requests: Mapping[str, Request]) -> None:
        """Charge for the prompt tokens of a step. ``scheduled`` are its tokens by request id;
        ``num_computed_tokens`` of ``requests`` counts them already."""
        for request_id, span in self._admitted.items():
            tokens = scheduled.get(request_id, 0)
            end = requests[request_id].num_computed_tokens if tokens else 0
            if (end - tokens, end) != (span.start, span.end):
                self._take_back(self._bills[request_id], span)
        self._admitted.clear()
        for request_id in self._unpaid & scheduled.keys():
            request = requests[request_id]
            bill, end, prompt = (
                self._bills[request_id],
                request.num_computed_tokens,
                request.num_prompt_tokens,
            )
            self._extend(bill, end - scheduled[request_id], end, prompt)
            if bill.paid_up_to >= prompt and not request.resumable:
                # The prompt of a session that takes input while it runs may still grow.
                self._unpaid.discard(request_id)

    def charge_output(self, requests: Iterable[Request]) -> None:
        """Charge for what was generated for ``requests`` since it was charged last."""
        tokens: dict[str, int] = {}
        expected: dict[str, int] = {}
        bills = self._bills
        for request in requests:
            bill = bills.get(request.request_id)
            if bill is None or bill.output_paid == (generated := request.num_output_tokens):
                continue
            client = bill.asking.client
            new = generated - bill.output_paid
            tokens[client] = tokens.get(client, 0) + new
            bill.output_paid = generated
            if bill.reserved:
                foreseen = min(new, bill.reserved)
                bill.reserved -= foreseen
                expected[client] = expected.get(client, 0) + foreseen
        for client, generated in tokens.items():
            self._order.charge_output(client, generated, expected.get(client, 0))

    def charge_output_of(self, request: Request, *, then: int | None = None) -> None:
        """The same for one request, whose count of generated tokens goes on from ``then``, if given."""
        self.charge_output((request,))
        bill = self._bills.get(request.request_id)
        if bill is not None and then is not None:
            bill.output_paid = then

    def _extend(self, bill: Bill, start: int, end: int, prompt: int) -> int:
        end = min(end, prompt)
        tokens = max(0, end - max(start, bill.paid_up_to))
        bill.paid_up_to = max(bill.paid_up_to, end)
        if tokens:
            self._order.charge_extend(bill.asking.client, tokens)
        return tokens

    def _take_back(self, bill: Bill, span: Span) -> None:
        bill.paid_up_to = span.paid_before
        self._release(bill)
        if span.charged:
            self._order.charge_extend(bill.asking.client, -span.charged)

    def _release(self, bill: Bill) -> None:
        if bill.reserved:
            self._order.release_output(bill.asking.client, bill.reserved)
            bill.reserved = 0

    def check_integrity(self, live: Mapping[str, Request]) -> None:
        """Assert that no bill outlives its request."""
        assert self._bills.keys() <= live.keys()
        assert self._unpaid <= self._bills.keys()
        assert not self._admitted
