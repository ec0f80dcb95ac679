"""Prefill-first, the baseline of SLOs-Serve: while a prompt can be computed, no request decodes.

vLLM's scheduler gives decodes their tokens before prompts, so decode-first is stock at a small budget;
this is the other extreme, first come, first served, carried out by the adapter of the SLO policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.plan import PASSIVE, Plan
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.requests import Limits, Running, Waiting


class PrefillFirst(Planner):
    """Plans no targets at all."""

    def __init__(self) -> None:
        super().__init__(SLOConfig())

    def lay_out(self, now_s: float, *state: Any) -> None:
        """Decodes have no pace to look after: nothing is laid out."""

    def plan(self, now_s: float, running: Sequence[Running], free_kv_tokens: int, limits: Limits) -> Plan:
        """Prompts that run, then those that wait and fit, as far as the budget goes; else stock's step."""
        caps: dict[str, int] = {}
        left, seats = limits.step_tokens, limits.running_requests - len(running)
        for request in running:
            if not request.decodes and left:
                caps[request.request_id] = min(left, request.missing_tokens)
                left -= caps[request.request_id]
        waiting = []
        for job in self.backlog:
            assert isinstance(job, Waiting)
            if left < 1 or seats < 1 or free_kv_tokens < job.tokens:
                break
            caps[job.request_id] = min(left, job.missing_tokens)
            left, seats = left - caps[job.request_id], seats - 1
            free_kv_tokens -= job.tokens
            waiting.append(job.request_id)
        self.backlog.put_in_front(waiting)
        if not caps:
            return PASSIVE
        return Plan(
            active=True,
            step_tokens=limits.step_tokens - left,
            caps=caps,
            order=tuple(sorted((r.request_id for r in running), key=lambda name: name not in caps)),
            waiting=tuple(waiting),
        )
