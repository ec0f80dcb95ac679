"""What SGLang's passes make of the prompts of a plan.

A plan is of a step that may hold a part of any prompt, beside decodes. SGLang has one prompt in chunks at a
time, which goes on in each pass with prompts and beside which others come in but whole; and without mixed
chunks a pass of prompts holds no decode, and keeps all of them waiting. Where a plan cannot be carried out,
or not at its price, decodes go on alone for a while: the slack that they gain makes a longer pass possible.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from penstock.schedulers.slo.plan import Plan
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.step_time import StepFeatures

WORTH_OVERHEADS = 2.0
"""Prompts have a pass of their own once their tokens take so many times what the pass costs beside."""


class Share(NamedTuple):
    """Tokens that prompts may have in a pass, in whole pages; those of the one in chunks among them; and
    whether every one of the prompts ends in the pass."""

    tokens: int
    chunk_tokens: int
    whole: bool


NOTHING = Share(0, 0, False)


class PromptPasses:
    """Decides for each pass what its prompts have; ``mixed`` passes with prompts hold the decodes as well."""

    def __init__(self, planner: Planner, *, mixed: bool, page: int) -> None:
        self._planner = planner
        self._mixed = mixed
        self._page = page
        self._alone = 0
        """Passes in a row in which decodes went on without the prompts that were planned."""

    def share(
        self, plan: Plan, part: Running | None, decodes: StepFeatures, tpot_s: float, most: int
    ) -> Share:
        """What prompts have in the next pass, no tokens if decodes are to go on alone.

        ``part`` is the prompt that goes on in chunks, ``decodes`` a pass of all decodes, ``tpot_s`` the
        tightest time per token among them (0: none is known to have one), ``most`` the tokens of a pass.
        """
        gains = self._gains_slack(decodes, tpot_s)
        share = self._of(plan, part, self._longest(decodes, most) if gains else 0)
        if gains and not self._mixed and not self._worth_a_pass(share, decodes):
            share = NOTHING
        prompts = plan.waiting or (part is not None and part.request_id in plan.caps)
        self._alone = self._alone + 1 if prompts and not share.tokens else 0
        return share

    def _gains_slack(self, decodes: StepFeatures, tpot_s: float) -> bool:
        """Whether decodes that go on alone gain time; only for so many passes in a row that prompts do not
        starve. By the pace of gaps an early token gains nothing."""
        config = self._planner.config
        bounded = self._alone < config.most_skipped_steps
        return bounded and config.pace != "gap" and self._planner.model.seconds(decodes) < tpot_s

    def _longest(self, decodes: StepFeatures, most: int) -> int:
        """The most prompt tokens that a pass may come to hold beside the decodes."""
        model, longest_s = self._planner.model, self._planner.config.longest_step_s
        requests, context = decodes.requests + 1, decodes.context_tokens
        return model.tokens_within(longest_s / model.margin, requests, context, most) - decodes.tokens

    def _of(self, plan: Plan, part: Running | None, longest: int) -> Share:
        """What is planned for a part of another prompt is given to ``part`` where it ends by that, or where
        the other is longer than ``longest``. Else the other waits until it comes in whole, before ``part``.
        """
        whole, rest, missing = 0, 0, 0
        for name in plan.waiting:
            job, tokens = self._planner.backlog.get(name), plan.caps[name]
            if job is not None and tokens < job.missing_tokens:
                rest, missing = rest + tokens, max(missing, job.missing_tokens)
            else:
                whole += self._in_pages(tokens)
        if part is None:
            return Share(whole + self._in_pages(rest), 0, not rest)
        own = plan.caps.get(part.request_id, 0)
        if missing > longest or own + rest >= part.missing_tokens:
            own += rest
        if not (whole or own):
            return NOTHING
        # SGLang never passes it over.
        own = self._in_pages(max(1, own))
        chunk = min(own, self._in_pages(part.missing_tokens))
        return Share(whole + own, chunk, own >= part.missing_tokens and not rest)

    def _worth_a_pass(self, share: Share, decodes: StepFeatures) -> bool:
        """Whether prompts are to have a pass of their own now, which takes its time however few tokens it
        computes, and for which decodes wait."""
        seconds = self._planner.model.seconds
        fixed_s = seconds(StepFeatures(1, 1, 0))
        tokens_s = seconds(StepFeatures(share.tokens, 1, 0)) - fixed_s
        enough_s = WORTH_OVERHEADS * (fixed_s + seconds(decodes))
        return share.whole or tokens_s >= min(enough_s, self._planner.config.longest_step_s / 2)

    def _in_pages(self, tokens: int) -> int:
        return math.ceil(tokens / self._page) * self._page
