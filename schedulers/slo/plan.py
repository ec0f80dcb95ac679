"""What one step does: the answer that an adapter carries out."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from penstock.schedulers.slo.step_time import StepFeatures


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens for every request of one step. ``active`` False leaves everything to the engine.

    A request that is not in ``caps`` is passed over in this step. ``order`` are running requests, those to
    throw out first at the end; ``reorders`` is False where they stand as they run already. ``waiting`` are
    those to take from the queue, in order; ``preempt`` running best-effort ones to throw out before the step.
    ``drafts`` are draft lengths, beside the caps and ``step_tokens``. ``best_effort`` are the requests of the
    step that no target protects. ``whole`` is a plan that gives one token to each running request and none to
    anybody else.
    """

    active: bool = False
    whole: bool = False
    step_tokens: int = 0
    caps: Mapping[str, int] = {}
    order: tuple[str, ...] = ()
    reorders: bool = False
    waiting: tuple[str, ...] = ()
    preempt: tuple[str, ...] = ()
    best_effort: frozenset[str] = frozenset()
    drafts: Mapping[str, int] = {}
    features: StepFeatures = StepFeatures(0, 0, 0)
    predicted_s: float = 0.0

    def cap(self, request_id: str, wanted: int) -> int:
        """How many of ``wanted`` tokens a request computes in this step."""
        return wanted if not self.active else min(wanted, self.caps.get(request_id, 0))


PASSIVE = Plan()
"""Nobody has targets: order, chunks and budget are the engine's own."""
