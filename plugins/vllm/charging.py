"""What each request has paid for: prompt tokens as they are computed, generated tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from penstock.plugins.vllm.later import Later
from penstock.schedulers import bills
from penstock.schedulers.asking import Asking
from penstock.schedulers.waiting import Clock, Job, WaitingOrder

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class Bill(bills.Bill):
    """``cached_tokens`` of the prompt were cached when that was looked up last; ``job`` is the request as
    orders saw it then."""

    cached_tokens: int = 0
    job: Job | None = None


class Span(NamedTuple):
    """Token positions ``start`` to ``end`` of a request that a step computes, and what they cost."""

    start: int
    end: int
    charged: int
    paid_before: int


class Charges:
    """Charges an order for what steps compute, each prompt token once however often it is computed again.

    A request is charged for its admission before the next pick, and the charge is settled with what the step
    in fact computes. Generated tokens are read off the requests, in turns: up to ``AT_ONCE`` of those that
    run are charged in every step, of more an ``EVERY``th part, so that what is not charged yet is what
    ``EVERY`` steps generate, for heavy and light clients alike.

    ``popped``, ``settle`` and ``close`` note what is to be charged and put the charge off to ``later``.
    """

    AT_ONCE = 4
    EVERY = 64

    def __init__(
        self, order: WaitingOrder, clock: Clock, asking_of: Callable[[Request], Asking], later: Later
    ) -> None:
        self._cashier = bills.Cashier(order)
        self._clock = clock
        self._asking_of = asking_of
        self._later = later
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
        self._cashier.release(bill)
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
        self._later.put(self._close, request)

    def _close(self, request: Request) -> None:
        self.charge_output_of(request)
        bill = self._bills.pop(request.request_id, None)
        self._unpaid.discard(request.request_id)
        if bill is not None:
            self._cashier.close(bill)

    def begin_step(self) -> None:
        """What was offered in the last step and not taken is off the table."""
        self._offered = None

    def charge_turn(self, running: Sequence[Request]) -> None:
        """Some of those that run are charged for what they have generated."""
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
        self._later.put(self._admit, request, start, tokens)

    def _admit(self, request: Request, start: int, tokens: int) -> None:
        bill = self.of(request)
        before = bill.paid_up_to
        charged = self._cashier.prompt(bill, start, start + tokens, request.num_prompt_tokens)
        self._admitted[request.request_id] = Span(start, start + tokens, charged, before)
        self._cashier.reserve(bill, request.max_tokens)

    def settle(self, scheduled: Mapping[str, int], requests: Mapping[str, Request]) -> None:
        """A step computes ``scheduled`` tokens by request id; ``num_computed_tokens`` of ``requests`` counts
        them already. Those of prompts are to be paid for."""
        if not self._unpaid and not self._admitted:
            return
        computed = []
        for request_id in self._unpaid & scheduled.keys():
            request = requests[request_id]
            end = request.num_computed_tokens
            computed.append((request, end - scheduled[request_id], end))
        self._later.put(self._settle, computed)

    def _settle(self, computed: Sequence[tuple[Request, int, int]]) -> None:
        """The last step computed positions from the first to the second number of these requests."""
        found = {request.request_id: (start, end) for request, start, end in computed}
        for request_id, span in self._admitted.items():
            if found.get(request_id, (0, 0)) != (span.start, span.end):
                self._cashier.take_back(self._bills[request_id], span.charged, span.paid_before)
        self._admitted.clear()
        for request, start, end in computed:
            bill, prompt = self._bills[request.request_id], request.num_prompt_tokens
            self._cashier.prompt(bill, start, end, prompt)
            if bill.paid_up_to >= prompt and not request.resumable:
                # The prompt of a session that takes input while it runs may still grow.
                self._unpaid.discard(request.request_id)

    def charge_output(self, requests: Iterable[Request]) -> None:
        """Charge for what was generated for ``requests`` since it was charged last."""
        bills = self._bills
        self._cashier.output(
            (bill, request.num_output_tokens)
            for request in requests
            if (bill := bills.get(request.request_id)) is not None
        )

    def charge_output_of(self, request: Request, *, then: int | None = None) -> None:
        """The same for one request, whose count of generated tokens goes on from ``then``, if given."""
        self.charge_output((request,))
        bill = self._bills.get(request.request_id)
        if bill is not None and then is not None:
            bill.output_paid = then

    def check_integrity(self, live: Mapping[str, Request]) -> None:
        """Assert that no bill outlives its request."""
        assert self._bills.keys() <= live.keys()
        assert self._unpaid <= self._bills.keys()
        assert not self._admitted
