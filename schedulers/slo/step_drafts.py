"""Draft lengths of one step of the plan: what a further token is worth to each decode, from its slack."""

from __future__ import annotations

import math

import numpy as np

from penstock.schedulers.drafts import Drafts
from penstock.schedulers.slo.batch import Needs
from penstock.schedulers.slo.decodes import DRAFTED, TPOT
from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.step_plan import Step

Drafting = tuple[float, float, Running]
"""Slack and time per token in seconds, request."""


def draft(drafts: Drafts | None, step: Step, needs: Needs, prompt_tokens: int) -> dict[str, int]:
    """Add drafts to a step that holds its decodes and return their lengths; ``prompt_tokens`` that wait for
    room compete with them. Without ``drafts`` to choose, all that there are go along."""
    drafting = _decodes(step, needs)
    if not drafting:
        return {}
    if drafts is None:
        step.add_drafts(sum(request.draft_tokens for _, _, request in drafting))
        return {}
    rows = np.array([drafts.row(request.request_id, request.class_name) for _, _, request in drafting])
    available = np.array([_usable(request) for _, _, request in drafting])
    slack_s, tpot_s = np.array([one[:2] for one in drafting]).T
    lengths = drafts.choose(rows, available, slack_s, tpot_s, step.besides(prompt_tokens))
    step.add_drafts(int(lengths.sum()))
    return {
        request.request_id: length
        for (_, _, request), length in zip(drafting, lengths.tolist(), strict=True)
        if length
    }


def _decodes(step: Step, needs: Needs) -> list[Drafting]:
    """The decodes of the step that have drafts. Best-effort ones, whose turn comes after the prompts, have no
    pace."""
    caps, paced = step.caps, needs.paced
    columns, drafted = paced.columns, paced.columns.values[DRAFTED] > 0
    found = [
        (float(paced.time_s[place]), float(columns.values[TPOT, place]), columns.request(place))
        for place in (paced.by_turn(drafted) if drafted.any() else ())
        if columns.names[place] in caps
    ]
    best = (request for _, name, request in needs.best_decodes if name in caps and request.draft_tokens)
    return found + [(math.inf, math.inf, request) for request in best]


def _usable(request: Running) -> int:
    """A draft that reaches beyond the last token is wasted there."""
    return max(0, min(request.draft_tokens, request.max_output_tokens - request.output_tokens - 1))
