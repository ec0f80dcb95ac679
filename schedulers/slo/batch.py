"""The running batch, sorted by what each request needs of the step that is planned."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from penstock.schedulers.slo.pacing import Pacing
from penstock.schedulers.slo.requests import Running

SPARE_S = 0.001
"""How much earlier than due a decode is planned: predictions are a little off either way (SLOs-Serve takes
as much from each time per token)."""


@dataclass(slots=True)
class Sorted:
    """Running requests by need; times are slack in seconds from the start of the step.

    ``guarded`` decodes can still meet their deadlines and bound the step's length; ``late`` ones keep their
    pace; ``prefills`` have targets in reach. The rest is best effort.
    """

    guarded: list[tuple[float, str, Running]] = field(default_factory=list)
    late: list[tuple[float, str, Running]] = field(default_factory=list)
    prefills: list[tuple[float, str, Running]] = field(default_factory=list)
    best_decodes: list[tuple[float, str, Running]] = field(default_factory=list)
    best_prefills: list[tuple[float, str, Running]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        running: Sequence[Running],
        start_s: float,
        late_tpots: float,
        demoted: Container[str],
        pacing: Pacing,
    ) -> Sorted:
        """One pass over the batch, each list in the order in which it is served."""
        batch = cls()
        guarded, slack_s = batch.guarded, pacing.slack_s
        for request in running:
            targets, name = request.targets, request.request_id
            decodes = request.output_tokens > 0 and request.tokens - request.computed_tokens <= 1
            if targets is None or name in demoted:
                if decodes:
                    batch.best_decodes.append((request.last_token_s or request.arrival_s, name, request))
                else:
                    batch.best_prefills.append((request.arrival_s, name, request))
                continue
            slack = slack_s(request, targets, start_s)
            if not decodes:
                batch.prefills.append((slack, name, request))
                continue
            slack -= SPARE_S
            if slack >= -late_tpots * targets.tpot_s:
                guarded.append((slack, name, request))
            else:
                paced = (request.last_token_s or start_s) + targets.tpot_s - start_s
                batch.late.append((paced, name, request))
        for part in (batch.guarded, batch.late, batch.prefills, batch.best_decodes, batch.best_prefills):
            part.sort()
        return batch
