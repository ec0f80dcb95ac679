"""How many prompt tokens a second the engine has left beside a number of decodes in each tier.

Steps are as long as the tightest tier present allows; each holds one token for the share of each tier that is
due in it, and prompt tokens in what is left (SLOs-Serve's auto-regressive planner, restated as a rate). The
rate depends on how many requests decode in which tier and not on which, so it is computed once for each
combination.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.schedulers.slo.targets import Tiers

Counts = tuple[int, ...]
"""Accepted requests in each tier."""
Rates = NDArray[np.float64]


class Yield(NamedTuple):
    """Tokens that a decode gets of a step that serves it, and takes there; drafts make both more."""

    gets: float = 1.0
    takes: float = 1.0


PLAIN = Yield()


class Supply(Protocol):
    """Prefill tokens a second by accepted requests in each tier."""

    @property
    def tiers(self) -> int:
        """Number of tiers."""

    def rate(self, counts: Counts) -> float:
        """Prompt tokens a second, at least 0, while ``counts`` accepted requests decode in each tier."""

    def sustains(self, counts: Counts) -> bool:
        """Whether the engine keeps the pace of that many decodes at all."""

    def of_each(self, counts: NDArray[np.int64]) -> tuple[Rates, NDArray[np.bool_]]:
        """``rate`` and ``sustains`` for each row of ``counts``, ``[rows, tiers]``."""
        rows: list[Counts] = [tuple(row) for row in counts.tolist()]
        return np.array([self.rate(row) for row in rows], float), np.array(
            [self.sustains(row) for row in rows], bool
        )


class ModelledSupply(Supply):
    """The supply of an engine as a step-time model sees it.

    ``running`` are decodes that are served already, by tier; fractions stand for those that end soon.
    ``context_tokens`` is what a decode attends to on average, ``most_tokens`` what a step may hold. A step
    may last as long as what decodes get of it pays for.
    """

    def __init__(
        self,
        model: StepTimeModel,
        tiers: Tiers,
        running: Sequence[float],
        *,
        context_tokens: float,
        longest_step_s: float,
        most_tokens: int,
        yields: Yield = PLAIN,
    ) -> None:
        self._model = model
        self._tpots = tiers.tpots_s
        self._running = tuple(running)
        self._context = context_tokens
        self._longest = longest_step_s
        self._most = most_tokens
        self._yields = yields
        self._loads = np.array(self._running)
        self._paced_s = yields.gets * np.array(self._tpots)
        self._steps_s = np.append(np.minimum(longest_step_s, self._paced_s), longest_step_s)
        self._rates: dict[Counts, tuple[float, bool]] = {}

    @property
    def tiers(self) -> int:
        """Number of tiers."""
        return len(self._tpots)

    def rate(self, counts: Counts) -> float:
        """Prompt tokens a second, at least 0, beside ``counts``."""
        found = self._rates.get(counts)
        return (found or self._compute(counts))[0]

    def sustains(self, counts: Counts) -> bool:
        """Whether a step of the tightest tier holds its decodes."""
        found = self._rates.get(counts)
        return (found or self._compute(counts))[1]

    def _compute(self, counts: Counts) -> tuple[float, bool]:
        gets, takes = self._yields
        step, decodes = 0.0, 0.0
        for place, count in enumerate(counts):
            load = self._running[place] + count
            if load > 0:
                paced = gets * self._tpots[place]
                step = step or min(self._longest, paced)
                decodes += load * min(1.0, step / paced)
        step = step or self._longest
        requests = int(decodes) + 1
        context = int(decodes * self._context)
        verified = decodes * takes
        tokens = self._model.tokens_within(step / self._model.margin, requests, context, self._most)
        sustained = tokens >= verified
        if tokens >= self._most:
            full = self._model.margin * self._model.seconds(StepFeatures(tokens, requests, context))
            verified *= full / step
            step = full
        found = self._rates[counts] = max(0.0, (tokens - verified) / step), sustained
        return found

    def of_each(self, counts: NDArray[np.int64]) -> tuple[Rates, NDArray[np.bool_]]:
        """``rate`` and ``sustains`` for each row of ``counts``, step by step as ``_compute``."""
        takes = self._yields.takes
        loads = counts + self._loads
        # The tightest tier that is present, or the last column where none is.
        first = np.argmax(np.append(loads > 0, np.ones((len(loads), 1), np.bool_), axis=1), axis=1)
        step = self._steps_s[first]
        shares = np.minimum(1.0, step[:, None] / self._paced_s)
        # One after the other, as a sum over so few is not by itself.
        decodes = np.cumsum(loads * shares, axis=1)[:, -1]
        requests, context = decodes.astype(np.int64) + 1, (decodes * self._context).astype(np.int64)
        verified = decodes * takes
        tokens = self._model.tokens_within_each(step / self._model.margin, requests, context, self._most)
        sustained = tokens >= verified
        for place in np.flatnonzero(tokens >= self._most).tolist():
            features = StepFeatures(int(tokens[place]), int(requests[place]), int(context[place]))
            full = self._model.margin * self._model.seconds(features)
            verified[place] *= full / step[place]
            step[place] = full
        return np.maximum(0.0, (tokens - verified) / step), sustained
