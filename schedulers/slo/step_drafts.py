"""Draft lengths of one step: what a further token is worth to each decode, from its slack."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.schedulers.draft_policy import DraftPolicy
from penstock.schedulers.drafts import Drafting
from penstock.schedulers.slo.batch import Sorted
from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.step_plan import Step

PROMPT_WORTH = 0.2
"""A prompt token to a decode token: about how many of the former there are for each of the latter."""

SPARE_WORTH = 0.5
"""A token ahead of its pace, or of a request without targets, to one that is needed for the pace."""


def draft(policy: DraftPolicy, step: Step, batch: Sorted, prompts: bool) -> dict[str, int]:
    """Add drafts to the decodes of a step and return their lengths; prompts that wait compete with them."""
    room = step.room(step.length_s)
    lengths = policy.lengths(
        list(_drafting(policy, step, batch)),
        step.seconds_with_drafts,
        most_tokens=room,
        other_worth=PROMPT_WORTH * room if prompts else 0.0,
        opportunity=PROMPT_WORTH if prompts else 0.0,
    )
    for name, tokens in lengths.items():
        step.add_draft(name, tokens)
    return lengths


def _drafting(policy: DraftPolicy, step: Step, batch: Sorted) -> Iterator[Drafting]:
    """The decodes of the step. One is behind its pace by what is due before the end of the next step."""
    for slack, name, request in (*batch.guarded, *batch.late):
        if name in step.caps and request.targets is not None:
            due = 1 + max(0.0, 2 * step.length_s - slack) / request.targets.tpot_s
            yield Drafting(name, _survival(policy, request), 1.0, due, SPARE_WORTH)
    for _, name, request in batch.best_decodes:
        if name in step.caps:
            yield Drafting(name, _survival(policy, request), SPARE_WORTH)


def _survival(policy: DraftPolicy, request: Running) -> list[float]:
    left = max(0, request.max_output_tokens - request.output_tokens - 1)
    return list(policy.estimator.survival(request.request_id, request.class_name))[:left]
