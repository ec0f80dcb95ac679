"""What each request has paid for: prompt tokens as they are computed, generated tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.schedulers.asking import Asking
from penstock.schedulers.waiting import Clock, Job, WaitingOrder

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class Bill:
    """One live request. ``paid_up_to`` is the furthest prompt position that was ever computed for it, or
    skipped because the prefix cache or a connector had it: a position is charged when it is first passed."""

    asking: Asking
    arrival_s: float
    paid_up_to: int = 0
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
    the charge is settled with what the step in fact computes.
    """

    def __init__(self, order: WaitingOrder, clock: Clock, asking_of: Callable[[Request], Asking]) -> None:
        self._order = order
        self._clock = clock
        self._asking_of = asking_of
        self._bills: dict[str, Bill] = {}
        self._offered: tuple[str, int, int] | None = None
        self._admitted: dict[str, Span] = {}
        # Left the queue, and have prompt tokens to pay for: few, where all that run are many.
        self._unpaid: set[str] = set()
        self._generated: dict[str, int] = {}

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
        if bill.job is None or bill.job.tokens != request.num_tokens:
            bill.job = Job(
                request_id=request.request_id,
                client=bill.asking.client,
                tokens=request.num_tokens,
                arrival_s=bill.arrival_s,
                prefix=tuple(request.block_hashes),
                weight=bill.asking.weight,
            )
        return bill.job

    def close(self, request: Request) -> None:
        """The request is over."""
        self._bills.pop(request.request_id, None)
        self._unpaid.discard(request.request_id)

    def begin_step(self) -> None:
        """What was offered in the last step and not taken is off the table."""
        self._offered = None
        self._charge_generated()

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

    def generated(self, request: Request, tokens: int) -> None:
        """Tokens were generated; charged together with those of the same step."""
        client = self.of(request).asking.client
        self._generated[client] = self._generated.get(client, 0) + tokens

    def end_of_output(self) -> None:
        """All of a step's output was seen."""
        self._charge_generated()

    def _charge_generated(self) -> None:
        for client, tokens in self._generated.items():
            self._order.charge_output(client, tokens)
        self._generated.clear()

    def _extend(self, bill: Bill, start: int, end: int, prompt: int) -> int:
        end = min(end, prompt)
        tokens = max(0, end - max(start, bill.paid_up_to))
        bill.paid_up_to = max(bill.paid_up_to, end)
        if tokens:
            self._order.charge_extend(bill.asking.client, tokens)
        return tokens

    def _take_back(self, bill: Bill, span: Span) -> None:
        bill.paid_up_to = span.paid_before
        if span.charged:
            self._order.charge_extend(bill.asking.client, -span.charged)

    def check_integrity(self, live: Mapping[str, Request]) -> None:
        """Assert that no bill outlives its request."""
        assert self._bills.keys() <= live.keys()
        assert self._unpaid <= self._bills.keys()
        assert not self._admitted
