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

SELDOM_S = 0.1
"""Often enough for what is shown once a second."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """The time on the first rank's clock, which travels among requests."""

    now_s: float


class SharedClock:
    """Seconds on the first rank's clock, as of the beginning of the last pass that heard of the time; before
    that 0.

    It stands still while a pass is made. A pass that hears of requests hears of the time, which costs nothing
    then; another one does ``every_s`` after the last that did, which costs a collective of SGLang's more.
    """

    def __init__(self, every_s: float = 0.0) -> None:
        self._every_s = every_s
        self._now_s = 0.0
        self._calls: list[Callable[[], None]] = []

    def __call__(self) -> float:
        return self._now_s

    def at_next(self, call: Callable[[], None]) -> None:
        """Make ``call`` when a pass next hears of the time, before anything else, in the order of asking."""
        self._calls.append(call)

    def begin_pass(self, now_s: float) -> None:
        """A pass begins, and hears of the time."""
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
            now_s = time.monotonic()
            if requests or now_s - self._now_s >= self._every_s:
                requests = [Stamp(now_s), *requests]
        heard = broadcast(requests)
        for stamp in [one for one in heard if type(one) is Stamp]:
            heard.remove(stamp)
            self.begin_pass(stamp.now_s)
        return heard
