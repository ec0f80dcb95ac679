"""The running batch while all of it decodes, kept so that a step that goes on with it touches no request.

Hundreds of requests lie apart in memory: to read one number of each takes as long as a plan for all of them.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from penstock.schedulers.slo.requests import Running

if TYPE_CHECKING:
    from vllm.v1.request import Request


class DecodeBatch:
    """Requests in the order in which they run, their ids, the tokens that they computed so far, and their
    records as the planner sees them.

    Whoever gives one of them more to compute than its next token calls ``forget``; who ends, ``left``.
    """

    def __init__(self) -> None:
        self.forget()

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
        self._records: list[Running] = []
        self._steps = 0
        self._computed: int | None = None
        self.names: tuple[str, ...] = ()

    def left(self, request: Request) -> None:
        """A request ended. The others stay as they are."""
        if request.request_id not in self.names:
            return
        place = self.names.index(request.request_id)
        del self._requests[place]
        del self._records[place]
        self.names = self.names[:place] + self.names[place + 1 :]
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

    def records(self, output_s: float) -> list[Running]:
        """The records of those who have a token to come, after the steps that gave each its next one; of
        these the last one came back at ``output_s``."""
        steps, self._steps = self._steps, 0
        if steps:
            for record in self._records:
                record.tokens += steps
                record.computed_tokens += steps
                record.output_tokens += steps
                record.last_token_s = output_s
        return [one for one in self._records if one.output_tokens < one.max_output_tokens]

    def join(self, others: list[Request], records: list[Running]) -> None:
        """Those who run behind them decode, too. Their ``records`` are set back by the steps that those of
        the first do not count yet."""
        for record in records:
            record.tokens -= self._steps
            record.computed_tokens -= self._steps
            record.output_tokens -= self._steps
        self._requests += others
        self._records += records
        self.names += tuple([request.request_id for request in others])
        if self._computed is not None:
            self._computed += sum([request.num_computed_tokens for request in others])
