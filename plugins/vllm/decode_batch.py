"""The running batch while all of it decodes, kept so that a step that goes on with it touches no request.

Hundreds of requests lie apart in memory: to read one number of each takes as long as a plan for all of them.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from penstock.schedulers.slo.decodes import Columns, Decodes
from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.targets import Pace

if TYPE_CHECKING:
    from vllm.v1.request import Request


class DecodeBatch:
    """Requests in the order in which they run, the tokens that they computed so far, and what the planner
    wants to know of them under a pace.

    Whoever gives one of them more to compute than its next token calls ``forget``; who ends, ``left``.
    """

    def __init__(self, pace: Pace) -> None:
        self._decodes = Decodes(pace)
        self.forget()

    @property
    def names(self) -> tuple[str, ...]:
        """Their ids."""
        return self._decodes.names

    def is_all_of(self, running: list[Request]) -> bool:
        """Whether these run now, and nobody else."""
        return running == self._requests

    def others(self, running: list[Request]) -> list[Request]:
        """Who runs behind them. If those before are not these, nothing is known any more, and it is all."""
        number = len(self._requests)
        if running[:number] != self._requests:
            self.forget()
            number = 0
        return running[number:]

    def are_in(self, names: Container[str]) -> bool:
        """Whether ``names`` holds every id."""
        return all(map(names.__contains__, self.names))

    def forget(self) -> None:
        """It is not known whether all that run decode."""
        self._requests: list[Request] = []
        self._decodes.clear()
        self._steps = 0
        self._output_s = float("nan")
        self._computed: int | None = None

    def left(self, request: Request) -> None:
        """A request ended. The others stay as they are."""
        if request.request_id not in self.names:
            return
        place = self.names.index(request.request_id)
        del self._requests[place]
        self._decodes.leave(place)
        if self._computed is not None:
            self._computed -= request.num_computed_tokens

    def went_on(self) -> int:
        """A step gave each its next token: tokens that all of them have computed after it."""
        self._steps += 1
        if self._computed is None:
            self._computed = sum([request.num_computed_tokens for request in self._requests])
        else:
            self._computed += len(self._requests)
        return self._computed

    def columns(self, output_s: float) -> Columns:
        """Those who have a token to come, after the steps that gave each its next one; of these the last one
        came back at ``output_s``."""
        self._count_steps(output_s)
        return self._decodes.columns()

    def join(
        self,
        others: list[Request],
        records: list[Running],
        output_s: float,
        comes_back_s: float | None = None,
    ) -> None:
        """Those who run behind them decode, too; ``records`` say how far they are. With ``comes_back_s`` it
        is the batch once the step in flight comes back then; without, the last one did at ``output_s``."""
        self._count_steps(output_s if comes_back_s is None else comes_back_s)
        self._requests += others
        self._decodes.join(records, comes_back_s)
        if self._computed is not None:
            self._computed += sum([request.num_computed_tokens for request in others])

    def _count_steps(self, output_s: float) -> None:
        if self._steps:
            self._decodes.went_on(self._steps)
            self._steps = 0
        elif output_s == self._output_s:
            return
        self._decodes.came_back(output_s)
        self._output_s = output_s
