"""What draft tokens add to a step, learned from steps that differ in little else.

A step-time model that fits all steps need not know this: where every step drafts as much, a high base and
cheap tokens explain the times as well as the reverse, and then drafts look free for ever. Of two decode steps
in a row with the same requests, the difference in time over the difference in tokens is the cost of a token,
whatever else is true of them. That takes steps that differ, so where lengths hardly vary, a step without
drafts is asked for now and then.
"""

from __future__ import annotations

import numpy as np

from penstock.schedulers.acceptance_table import Floats, Ints
from penstock.schedulers.slo.step_time import LONGEST_STEP_S, StepFeatures, StepTimeModel

PAIR_DECAY = 0.99
LEVEL_DECAY = 0.8
PRIOR_TOKENS = 4.0
"""The model's own slope counts as much as a pair of steps that differ by so many tokens."""
LARGEST_RATIO = 20.0
"""Two steps that differ in time by more are not of one kind."""


class DraftCost:
    """Corrects a step-time model in its slope over draft tokens, and in its level where steps decode only."""

    def __init__(self, model: StepTimeModel) -> None:
        self._model = model
        self._pairs = self._spread = 0.0
        self._level_s = 0.0
        self._last: tuple[int, int, float] | None = None

    @property
    def token_s(self) -> float:
        """Seconds that one draft token adds, where the model's slope is the lowest."""
        prior = PRIOR_TOKENS**2
        return max(0.0, (self._pairs + prior * self._model_token_s) / (self._spread + prior))

    @property
    def _model_token_s(self) -> float:
        return self._model.seconds(StepFeatures(1, 0, 0)) - self._model.seconds(StepFeatures(0, 0, 0))

    def observe(self, features: StepFeatures, drafted: int, seconds: float) -> None:
        """A step took ``seconds``, of its tokens ``drafted`` were drafts. The model is told by its owner."""
        decodes_only = features.tokens == features.requests + drafted
        if not (decodes_only and 0 < seconds < LONGEST_STEP_S):
            self._last = None
            return
        if self._last is not None and self._last[0] == features.requests:
            self._compare(drafted - self._last[1], seconds, self._last[2])
        self._last = (features.requests, drafted, seconds)
        plain_s = self._model.seconds(features._replace(tokens=features.requests))
        drafts = np.array([features.requests, features.tokens])
        predicted_s = plain_s + float(np.diff(self._added(features, drafts))[0])
        self._level_s += (1 - LEVEL_DECAY) * (seconds - predicted_s - self._level_s)

    def _compare(self, more_tokens: int, seconds: float, before_s: float) -> None:
        if more_tokens and 1 / LARGEST_RATIO < seconds / before_s < LARGEST_RATIO:
            self._pairs = PAIR_DECAY * self._pairs + more_tokens * (seconds - before_s)
            self._spread = PAIR_DECAY * self._spread + more_tokens**2

    def seconds(self, features: StepFeatures, tokens: Ints) -> Floats:
        """Times of a step by its ``tokens``, rising; the first are those without drafts."""
        plain_s = self._model.seconds(features._replace(tokens=int(tokens[0])))
        return max(0.1 * plain_s, plain_s + self._level_s) + self._added(features, tokens)

    def _added(self, features: StepFeatures, tokens: Ints) -> Floats:
        """What tokens beyond the first add: the learned cost, and the model's where it is steeper."""
        times = self._model.seconds_with(features, tokens)
        more = tokens - tokens[0]
        steeper = times - times[0] - self._model_token_s * more
        added: Floats = self.token_s * more + np.maximum(0.0, steeper)
        return added

    def unsure(self, drafted: int) -> bool:
        """Whether steps differed too little to say what ``drafted`` tokens add."""
        return self._spread < drafted**2
