"""One clock for all ranks of an engine.

Every rank of SGLang schedules for itself, from the same requests, and what one decides all must. So none may
read a clock of its own: the first rank, which sends the others the requests at the beginning of each pass of
the scheduler's loop, sends the time along. Stages of a pipeline send both on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LOOK_UPS = 4
"""Waiting requests whose cached prefix is looked up anew in a pass, at most. One rank bounds the time for it,
which would be another one on each."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """The time on the first rank's clock, which travels among requests."""

    now_s: float


class SharedClock:
    """Seconds on the first rank's clock as they were when the present pass began; 0 before the first one.

    It stands still while a pass is made. The end of what happens in one is known when the next one begins.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._calls: list[Callable[[], None]] = []

    def __call__(self) -> float:
        return self._now_s

    def at_next(self, call: Callable[[], None]) -> None:
        """Make ``call`` when the next pass begins, before anything else, in the order of asking."""
        self._calls.append(call)

    def begin_pass(self, now_s: float) -> None:
        """A pass begins."""
        self._now_s = now_s
        calls, self._calls = self._calls, []
        for call in calls:
            call()

    def stamped(self, requests: Sequence[Any]) -> list[Any]:
        """What the next stage of a pipeline is sent in this pass."""
        return [Stamp(self._now_s), *requests]

    def send_along(
        self, broadcast: Callable[[list[Any] | None], list[Any]], requests: list[Any] | None
    ) -> list[Any]:
        """Send the time with ``requests``, which are None on ranks that only hear and ``stamped`` where a
        stage before sent them; begin the pass, and return what ``broadcast`` does, without the time."""
        if requests is not None and not any(type(one) is Stamp for one in requests):
            requests = [Stamp(time.monotonic()), *requests]
        heard = broadcast(requests)
        (now_s,) = [one.now_s for one in heard if type(one) is Stamp]
        self.begin_pass(now_s)
        return [one for one in heard if type(one) is not Stamp]
