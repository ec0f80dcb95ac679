"""What draft tokens and passes of a drafter add to a step, learned from steps that differ in little else.

A step-time model that fits all steps need not know this: where every step drafts as much, a high base and
cheap tokens explain the times as well as the reverse, and then drafts look free for ever. Of two decode steps
in a row with the same requests, the difference in time over the difference in tokens is the cost of a token,
whatever else is true of them, and so it is with passes. That takes steps that differ, so where lengths hardly
vary, a step without drafts is asked for now and then, and where passes do not, a step with one.
"""

from __future__ import annotations

import numpy as np

from penstock.schedulers.acceptance_table import Floats, Ints
from penstock.schedulers.slo.step_time import LONGEST_STEP_S, StepFeatures, StepTimeModel

PAIR_DECAY = 0.99
LEVEL_DECAY = 0.8
PRIOR_TOKENS, PRIOR_PASSES = 4.0, 1.0
"""What is believed at first counts as much as a pair of steps that differ by so many."""
PASS_SHARE = 0.05
"""Of the time of a step without a token: what a pass is believed to take where a profile does not say."""
LARGEST_RATIO = 20.0
"""Two steps that differ in time by more are not of one kind."""


class DraftCost:
    """Corrects a step-time model in its slope over draft tokens, and in its level where steps decode only."""

    def __init__(self, model: StepTimeModel) -> None:
        self._model = model
        self._pair_s = np.zeros(2)
        self._spread = np.zeros((2, 2))
        """Sums over pairs of steps: differences in drafts and passes by those in time, and by each other."""
        self._level_s = 0.0
        self._last: tuple[int, Floats, float] | None = None

    @property
    def token_s(self) -> float:
        """Seconds that one draft token adds, where the model's slope is the lowest."""
        return self._slopes()[0]

    @property
    def pass_s(self) -> float:
        """Seconds that one pass of the drafter adds."""
        return self._slopes()[1]

    def _slopes(self) -> tuple[float, float]:
        prior = np.array([PRIOR_TOKENS, PRIOR_PASSES]) ** 2
        (token, both), (_, passes) = self._spread + np.diag(prior)
        first, second = self._pair_s + prior * (self._model.token_s, self._model_pass_s)
        # By Cramer's rule: a solver of any size takes as long as the rest of a step's estimates together.
        scale = token * passes - both * both
        return max(0.0, (first * passes - second * both) / scale), max(
            0.0, (second * token - first * both) / scale
        )

    @property
    def _model_pass_s(self) -> float:
        without_s = self._model.seconds(StepFeatures(0, 0, 0))
        pass_s = self._model.seconds(StepFeatures(0, 0, 0, 1)) - without_s
        return pass_s or PASS_SHARE * without_s

    def observe(self, features: StepFeatures, drafted: int, seconds: float) -> None:
        """A step took ``seconds``, of its tokens ``drafted`` were drafts. The model is told by its owner."""
        decodes_only = features.tokens == features.requests + drafted
        if not (decodes_only and 0 < seconds < LONGEST_STEP_S):
            self._last = None
            return
        varies = np.array([drafted, features.draft_passes], dtype=float)
        if self._last is not None and self._last[0] == features.requests:
            self._compare(varies - self._last[1], seconds, self._last[2])
        self._last = (features.requests, varies, seconds)
        plain_s = self._model.seconds(features._replace(tokens=features.requests, draft_passes=0))
        drafts = np.array([features.requests, features.tokens])
        predicted_s = plain_s + float(self._added(drafts)[1])
        predicted_s += self.pass_s * features.draft_passes
        self._level_s += (1 - LEVEL_DECAY) * (seconds - predicted_s - self._level_s)

    def _compare(self, more: Floats, seconds: float, before_s: float) -> None:
        if more.any() and 1 / LARGEST_RATIO < seconds / before_s < LARGEST_RATIO:
            self._pair_s = PAIR_DECAY * self._pair_s + more * (seconds - before_s)
            self._spread = PAIR_DECAY * self._spread + np.outer(more, more)

    def seconds(self, features: StepFeatures, tokens: Ints) -> Floats:
        """Times of a step by its ``tokens``, rising; the first are those without drafts."""
        plain_s = self._model.seconds(features._replace(tokens=int(tokens[0]), draft_passes=0))
        plain_s = max(0.1 * plain_s, plain_s + self._level_s) + self.pass_s * features.draft_passes
        times: Floats = self._added(tokens)
        times += plain_s
        return times

    def _added(self, tokens: Ints) -> Floats:
        """What tokens beyond the first add: the learned cost, and the model's where it is steeper."""
        steeper = self._model.knee_seconds(tokens)
        added: Floats = steeper + self.token_s * (tokens - tokens[0])
        added -= float(steeper[0])
        return added

    def unsure(self, drafted: int) -> bool:
        """Whether steps differed too little to say what ``drafted`` tokens add."""
        return bool(self._spread[0, 0] < drafted**2)

    def unsure_of_passes(self, passes: int) -> bool:
        """The same of passes."""
        return bool(self._spread[1, 1] < passes**2)
