"""The running batch while all of it decodes, kept so that a step that goes on with it touches no request.

Hundreds of requests lie apart in memory: to read one number of each takes as long as a plan for all of them.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request


class DecodeBatch:
    """Requests in the order in which they run, their ids, and the tokens that they computed so far.

    Whoever gives one of them more to compute than its next token calls ``forget``; who ends, ``left``.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._computed: int | None = None
        self.names: tuple[str, ...] = ()

    def is_all_of(self, running: list[Request]) -> bool:
        """Whether these run now, and nobody else."""
        return running == self._requests

    def are_in(self, names: Container[str]) -> bool:
        """Whether ``names`` holds every id."""
        return all(map(names.__contains__, self.names))

    def set(self, running: list[Request]) -> None:
        """All that run decode."""
        self._requests = running.copy()
        self.names = tuple([request.request_id for request in running])
        self._computed = None

    def forget(self) -> None:
        """It is not known whether all that run decode."""
        self._requests, self.names, self._computed = [], (), None

    def left(self, request: Request) -> None:
        """A request ended. The others stay as they are."""
        if request.request_id not in self.names:
            return
        self._requests.remove(request)
        self.names = tuple([name for name in self.names if name != request.request_id])
        if self._computed is not None:
            self._computed -= request.num_computed_tokens

    def went_on(self) -> int:
        """A step gave each its next token: tokens that all of them have computed after it."""
        if self._computed is None:
            self._computed = sum([request.num_computed_tokens for request in self._requests])
        else:
            self._computed += len(self._requests)
        return self._computed
