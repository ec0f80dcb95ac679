"""A layout of the next step, and whom vLLM ran when it was made."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from penstock.schedulers.slo.layout import Layout

if TYPE_CHECKING:
    from vllm.v1.request import Request


class LaidOut:
    """A layout for the step after one that ``running`` are in, and whether it can still be that step's."""

    def __init__(self, layout: Layout, running: list[Request]) -> None:
        self.layout = layout
        self._running = running.copy()
        self._names = frozenset([request.request_id for request in running])

    def is_for(self, running: list[Request], ended: Set[str]) -> bool:
        """Whether these run but for those of them who ``ended``. Who joins or is set back is in no layout:
        that the number is right says who they are, without a look at each."""
        if gone := len(self._names & ended):
            return len(running) == len(self._running) - gone
        return running == self._running
