"""All that is known about drafts: whose they are, what came of them, what they cost, and how long the next
ones should be. The one core of draft lengths, for a waiting order of any kind and for the SLO plan alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from penstock.schedulers.acceptance_table import Floats, Ints
from penstock.schedulers.draft_config import SpeculationConfig
from penstock.schedulers.draft_cost import DraftCost
from penstock.schedulers.draft_lengths import DraftLengths
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.schedulers.slo.supply import PLAIN, Yield

RECENT_DECAY = 0.98


class Besides(NamedTuple):
    """What a step holds besides drafts.

    ``decodes`` requests get their one sure token; ``prompt_tokens`` would be computed if they found room.
    With its prompts a step has at most ``prompts_within`` tokens, with decodes and drafts ``most_tokens``.
    """

    decodes: int
    prompt_tokens: int
    prompts_within: int
    most_tokens: int
    requests: int
    context_tokens: int


@dataclass(slots=True)
class Recent:
    """Decodes, draft tokens and accepted ones of recent steps."""

    decodes: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0

    def step(self, decodes: int, drafted: int) -> None:
        """A step more, in which nothing is accepted yet."""
        self.decodes = RECENT_DECAY * self.decodes + decodes
        self.drafted = RECENT_DECAY * self.drafted + drafted
        self.accepted *= RECENT_DECAY


class Drafts:
    """Drafts of up to ``most_tokens``; ``model`` is told of steps by whoever owns it.

    ``in_passes`` says that the drafter makes a pass for each token of the longest draft, and as many as it is
    told to.
    """

    def __init__(
        self, config: SpeculationConfig, most_tokens: int, model: StepTimeModel, *, in_passes: bool = False
    ) -> None:
        self._config = config
        self.most_tokens = most_tokens
        self.in_passes = in_passes
        self.model = model
        self.cost = DraftCost(model)
        self.lengths = DraftLengths(
            most_tokens,
            spare_worth=config.spare_worth,
            least_gain=config.least_gain,
            probe_share=config.probe_share,
        )
        self._recent = Recent()

    def row(self, request_id: str, class_name: str) -> int:
        """The request's place in what is learned, from its first draft until ``forget``."""
        return self.lengths.table.row(request_id, class_name)

    def find(self, request_ids: Sequence[str]) -> Ints:
        """The same of several, ``NOBODY`` where a request has none."""
        return self.lengths.table.find(request_ids)

    def forget(self, request_id: str) -> None:
        """A request is gone."""
        self.lengths.table.forget(request_id)

    @property
    def depth(self) -> int:
        """Tokens of the longest draft that should be made at the end of the step, at least 1."""
        return self.lengths.depth

    def seconds(self, besides: Besides, drafts: Ints) -> Floats:
        """Times of the step with so many draft tokens and one pass of the drafter, had it no prompts.

        Prompts are computed in this step or in the next: their time is the same whatever is drafted, and with
        it a step would look long, and passes and drafts beside it worth their time too seldom.
        """
        features = StepFeatures(0, besides.requests, besides.context_tokens, int(self.in_passes))
        return self.cost.seconds(features, besides.decodes + drafts)

    def choose(self, rows: Ints, available: Ints, slack_s: Floats, tpot_s: Floats, besides: Besides) -> Ints:
        """Draft tokens of each row.

        Args:
            rows: ``[n]``, rows of requests that decode in the step and may draft.
            available: ``[n]``, draft tokens that there are for each; those that there should be for the next
                step, ``depth``, are chosen with them.
            slack_s: ``[n]``, time from the start of the step until the next token of each is due.
            tpot_s: ``[n]``, seconds for each token after that; infinite without a pace.
            besides: what else the step holds; its decodes include those of ``rows``.
        """
        possible = len(rows) * self.most_tokens if self.in_passes else int(available.sum())
        room = max(0, min(possible, besides.most_tokens - besides.decodes))
        drafts = np.arange(room + 1)
        seconds = self.seconds(besides, drafts)
        needed = needed_tokens(slack_s, tpot_s, float(seconds[0]))
        spare, prompt = self._config.spare_worth, self._config.prompt_worth
        sure = spare * besides.decodes + (1 - spare) * np.count_nonzero(needed)
        rest = sure - prompt * displaced_prompts(besides, drafts)
        lengths = self.lengths.lengths(
            rows,
            available,
            needed,
            rest=rest,
            seconds=seconds,
            unsure=self.cost.unsure,
            pass_s=self.cost.pass_s if self.in_passes else 0.0,
            unsure_of_passes=self.cost.unsure_of_passes,
        )
        self._recent.step(len(rows), int(lengths.sum()))
        return lengths

    def learn(self, rows: Ints, drafted: Ints, accepted: Ints) -> None:
        """One step verified drafts: of ``drafted`` tokens of each row the first ``accepted`` were right.

        Raises:
            ValueError: more were accepted than drafted, or one is negative.
        """
        self.lengths.table.observe(rows, drafted, accepted)
        self._recent.accepted += int(accepted.sum())

    @property
    def yields(self) -> Yield:
        """What decodes lately got of a step and took there, all that might have drafted."""
        recent = self._recent
        if not recent.decodes:
            return PLAIN
        return Yield(1.0 + recent.accepted / recent.decodes, 1.0 + recent.drafted / recent.decodes)


def displaced_prompts(besides: Besides, drafts: Ints) -> Ints:
    """Prompt tokens that a step leaves out for so many draft tokens."""
    room = max(0, besides.prompts_within - besides.decodes)
    left: Ints = np.minimum(besides.prompt_tokens, np.maximum(0, room - drafts))
    return min(besides.prompt_tokens, room) - left


def needed_tokens(slack_s: Floats, tpot_s: Floats, step_s: float) -> Floats:
    """Tokens due before the end of the step after this one, the sure one included; 0 without a pace."""
    needed: Floats = 1.0 + np.maximum(0.0, 2 * step_s - slack_s) / tpot_s
    needed[np.isinf(tpot_s)] = 0.0
    return needed
