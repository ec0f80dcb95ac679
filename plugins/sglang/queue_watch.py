"""Who came to SGLang's list of waiting requests, and who left it, from one pass to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class QueueWatch:
    """The list as it was last seen, less those who were taken from it since.

    Lists are compared by identity first: of those who wait on, no request is looked at.
    """

    def __init__(self) -> None:
        self._seen: list[Req] = []
        self._taken: set[Req] = set()

    def took(self, request: Req) -> None:
        """A waiting request got what it waited for; it did not leave."""
        self._taken.add(request)

    def look(self, queue: list[Req]) -> tuple[Sequence[Req], Sequence[Req]]:
        """Who came, as they stand in ``queue``, and who left without being served."""
        before = self.waiting()
        self._taken.clear()
        # A copy, since a walk of the list may be somebody's.
        self._seen = now = queue[:]
        number = len(before)
        if now[:number] == before:
            return now[number:], ()
        here, known = set(now), set(before)
        came = [request for request in now if request not in known]
        return came, [request for request in before if request not in here]

    def waiting(self) -> list[Req]:
        """Those who were seen and not taken, as they stood."""
        if not self._taken:
            return self._seen
        return [request for request in self._seen if request not in self._taken]
