"""What each request has paid for: every prompt token once, generated tokens as they come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from penstock.schedulers.asking import Asking
from penstock.schedulers.waiting import WaitingOrder


@dataclass(slots=True)
class Bill:
    """One live request. ``paid_up_to`` is the furthest prompt position that was ever computed for it, or
    skipped because a cache or a connector had it: a position is charged when it is first passed.
    ``output_paid`` of its generated tokens are charged; ``reserved`` more are expected while it runs."""

    asking: Asking
    arrival_s: float
    paid_up_to: int = 0
    output_paid: int = 0
    reserved: int = 0


class Cashier:
    """Charges the clients of an order by the bills of their requests."""

    def __init__(self, order: WaitingOrder) -> None:
        self.order = order

    def prompt(self, bill: Bill, start: int, end: int, prompt_tokens: int) -> int:
        """Positions ``start`` to ``end`` are computed, those beyond ``prompt_tokens`` for free; returns how
        many are charged."""
        end = min(end, prompt_tokens)
        tokens = max(0, end - max(start, bill.paid_up_to))
        bill.paid_up_to = max(bill.paid_up_to, end)
        if tokens:
            self.order.charge_extend(bill.asking.client, tokens)
        return tokens

    def take_back(self, bill: Bill, tokens: int, paid_before: int) -> None:
        """``tokens`` that ``prompt`` charged in this step are not computed, and the request does not run."""
        bill.paid_up_to = paid_before
        self.release(bill)
        if tokens:
            self.order.charge_extend(bill.asking.client, -tokens)

    def output(self, generated: Iterable[tuple[Bill, int]]) -> None:
        """Charge requests up to the number of tokens that each has generated; each client once."""
        tokens: dict[str, int] = {}
        expected: dict[str, int] = {}
        for bill, total in generated:
            new = total - bill.output_paid
            if not new:
                continue
            client = bill.asking.client
            tokens[client] = tokens.get(client, 0) + new
            bill.output_paid = total
            if bill.reserved:
                foreseen = min(new, bill.reserved)
                bill.reserved -= foreseen
                expected[client] = expected.get(client, 0) + foreseen
        for client, new in tokens.items():
            self.order.charge_output(client, new, expected.get(client, 0))

    def reserve(self, bill: Bill, most_output_tokens: int) -> None:
        """The request begins to run, or goes on, and may generate so many tokens in all."""
        left = max(0, most_output_tokens - bill.output_paid)
        bill.reserved = self.order.reserve_output(bill.asking.client, bill.output_paid, left)

    def release(self, bill: Bill) -> None:
        """The request runs no more; what it was expected to generate will not come now."""
        if bill.reserved:
            self.order.release_output(bill.asking.client, bill.reserved)
            bill.reserved = 0

    def close(self, bill: Bill) -> None:
        """The request is over. One that was given up before its first token says nothing of how long answers
        are."""
        self.release(bill)
        if bill.output_paid:
            self.order.observe_output(bill.asking.client, bill.output_paid)
