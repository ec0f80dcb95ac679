"""Output that is charged when somebody looks at its client."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import chain
from typing import Generic, TypeVar

from penstock.schedulers.bills import Bill, Cashier
from penstock.schedulers.waiting import WaitingOrder

Billed = TypeVar("Billed", bound=Bill)


class Tabs(Generic[Billed]):
    """What running requests have generated and their clients have not paid.

    Hundreds run, and a pick asks how a few clients stand: the order has the tab of each of these settled
    first, and everybody's where all of them count. Every pick is as if all had been charged when the step
    began. ``generated`` is how many tokens a request has; it does not change between ``begin_step`` and the
    last pick of a step.
    """

    def __init__(self, order: WaitingOrder, cashier: Cashier, generated: Callable[[Billed], int]) -> None:
        self._cashier = cashier
        self._generated = generated
        self._tabs: dict[str, dict[Hashable, Billed]] = {}
        self._due: dict[str, None] = {}
        """In an order that every process has: that of a set of strings is another in each."""
        order.settle_by(self.settle)

    def open(self, name: Hashable, bill: Billed) -> None:
        """A request runs from now on."""
        self._tabs.setdefault(bill.asking.client, {})[name] = bill

    def close(self, name: Hashable, bill: Billed) -> None:
        """It runs no more. What it has generated is charged."""
        client = bill.asking.client
        self._cashier.output(((bill, self._generated(bill)),))
        tab = self._tabs[client]
        del tab[name]
        if not tab:
            del self._tabs[client]

    def begin_step(self) -> None:
        """Tokens may have come."""
        self._due = dict.fromkeys(self._tabs)

    def settle(self, client: str | None) -> bool:
        """Charge what came before the step for a client, or for everybody; whether there was anything due."""
        if client is None:
            due, self._due = self._due, {}
        elif client in self._due:
            del self._due[client]
            due = {client: None}
        else:
            return False
        running = chain.from_iterable(self._tabs[name].values() for name in due if name in self._tabs)
        self._cashier.output((bill, self._generated(bill)) for bill in running)
        return bool(due)
