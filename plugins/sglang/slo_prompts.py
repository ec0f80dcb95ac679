"""What SGLang's passes make of the prompts of a plan.

A plan is of a step that may hold a part of any prompt, beside decodes. SGLang has one prompt in chunks at a
time, which goes on in each pass with prompts and beside which others come in but whole; and without mixed
chunks a pass of prompts holds no decode, and keeps all of them waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from penstock.schedulers.slo.plan import Plan
from penstock.schedulers.slo.requests import Running, Waiting
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel

WORTH_OVERHEADS = 2.0
"""Prompts have a pass of their own once their tokens take so many times what the pass costs beside."""


class Share(NamedTuple):
    """Tokens that prompts may have in a pass, whole pages; those of the one in chunks among them; and whether
    every one of the prompts ends in the pass."""

    tokens: int
    chunk_tokens: int
    whole: bool


def share_out(
    plan: Plan,
    waiting: Callable[[str], Waiting | None],
    part: Running | None,
    *,
    longest: int,
    page: int,
) -> Share:
    """How a plan's tokens are shared out where ``part`` goes on in chunks; no tokens if that is to wait.

    What is planned for a part of another prompt is given to ``part`` where it ends by that, or where the
    other is longer than ``longest``, the most prompt tokens that a pass may come to hold. Else the decodes go
    on alone for a while: the slack that they gain lets the other come in whole, before the one in chunks.
    """

    def pages(tokens: int) -> int:
        return -(-tokens // page) * page

    others, rest, most = 0, 0, 0
    for name in plan.waiting:
        job, tokens = waiting(name), plan.caps[name]
        if job is not None and tokens < job.missing_tokens:
            rest, most = rest + tokens, max(most, job.missing_tokens)
        else:
            others += pages(tokens)
    if part is None:
        return Share(others + pages(rest), 0, not rest)
    own = plan.caps.get(part.request_id, 0)
    if most > longest or own + rest >= part.missing_tokens:
        own += rest
    if not (others or own):
        return Share(0, 0, False)
    own = pages(max(1, own))
    ends = own >= part.missing_tokens
    return Share(others + own, min(own, pages(part.missing_tokens)), ends and not rest)


def worth_a_pass(share: Share, model: StepTimeModel, decodes_s: float, longest_s: float) -> bool:
    """Whether prompts are to have a pass of their own now, for which decodes wait whose next pass takes
    ``decodes_s``; no pass is longer than ``longest_s``.

    A pass takes its time however few tokens it computes. Decodes that go on alone gain slack for more.
    """
    if share.whole:
        return True
    fixed_s = model.seconds(StepFeatures(1, 1, 0))
    tokens_s = model.seconds(StepFeatures(share.tokens, 1, 0)) - fixed_s
    return tokens_s >= min(WORTH_OVERHEADS * (fixed_s + decodes_s), longest_s / 2)
