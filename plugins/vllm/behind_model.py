"""A scheduler that leaves what no step waits for until the device computes one."""

from __future__ import annotations

from typing import Any

from penstock.plugins.vllm.draft_control import DraftControlling
from penstock.plugins.vllm.later import Later
from penstock.plugins.vllm.request_queue import OrderedQueue


class BehindTheModel(DraftControlling):
    """Works while the device does.

    vLLM's engine core hands a step to the executor and asks for the grammar's bitmask before it waits for the
    result. What was put off is done there, in the order in which it came up, and the next step is prepared.
    Nothing depends on being asked: what is not done there, whoever mixes this in does before the next step.
    """

    waiting: OrderedQueue
    _later: Later

    def get_grammar_bitmask(self, *args: Any, **kwargs: Any) -> Any:
        grammar = super().get_grammar_bitmask(*args, **kwargs)
        self._catch_up()
        self._prepare()
        return grammar

    def _catch_up(self) -> None:
        """Do all that was put off; those who came in the meantime stand in line from now on."""
        self._later.do()
        self.waiting.join()

    def _prepare(self) -> None:
        """Do for the next step what can be done before it."""
