"""How long a step will take, learned while serving, and how many tokens fit into a time.

A shipped profile is the prior. The median ratio of the last measured steps to their predictions corrects it
at once and survives outliers; every few steps a robust non-negative fit over remembered steps, a few for
each size of step, takes over the shape. Sources: SLOs-Serve, batch-time model; the successor's terms for
requests and past tokens.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.schedulers.slo.nonnegative import fit_robust
from penstock.schedulers.slo.profiles import KNEES, Profile

Seconds = NDArray[np.float64]
Numbers = NDArray[np.int64]

RECENT = 15
LEAST_RATIOS = 3
REFIT_STEPS = 16
SETTLED_STEPS = 256
SETTLED_REFIT_STEPS = 64
REMEMBERED_PER_SIZE = 12
LEAST_ALIKE = 6
HALF_LIFE_STEPS = 1024.0
PRIOR_WEIGHT = 0.3
LARGEST_CORRECTION = 100.0
LONGEST_STEP_S = 120.0
LARGEST_MARGIN = 0.5
UNBOUNDED = 1 << 40
PRIOR_POINTS = tuple(
    (tokens, requests, context, passes)
    for tokens in (1, 256, 1024, 4096)
    for requests, context, passes in ((1, 1_000, 0), (64, 100_000, 0), (256, 400_000, 4))
)


class StepFeatures(NamedTuple):
    """What a step holds: scheduled tokens, requests among which they are, KV tokens they attend to, and the
    length of the longest draft, whose passes the drafter makes one after the other.
    """

    tokens: int
    requests: int
    context_tokens: int
    draft_passes: int = 0


class StepTimeModel:
    """Predicts seconds of a step; rising in every feature, so that it has an inverse."""

    def __init__(self, profile: Profile) -> None:
        self._prior = profile.coefficients
        self._shape = profile.coefficients
        self._scale = 1.0
        self._steps = 0
        self._recent: deque[tuple[StepFeatures, float]] = deque(maxlen=RECENT)
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._errors: deque[float] = deque(maxlen=128)
        self._remembered: dict[tuple[int, int], deque[tuple[int, StepFeatures, float]]] = {}
        self.rejected_steps = 0
        self.margin = 1.0
        """Factor on predictions that most measured steps stay below."""

    def seconds(self, features: StepFeatures) -> float:
        """The predicted time of a step."""
        return self._scale * self._unscaled(features)

    @property
    def token_s(self) -> float:
        """Seconds that a token adds to a step of few."""
        return self._scale * self._shape[1]

    def knee_seconds(self, tokens: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """What steps of so many ``tokens``, rising, take beyond ``token_s`` for each."""
        _, _, knee1, knee2, *_ = self._shape
        added: NDArray[np.floating[Any]] = np.zeros(len(tokens))
        if knee1 and tokens[-1] > KNEES[0]:
            added += self._scale * knee1 * np.maximum(0, tokens - KNEES[0])
        if knee2 and tokens[-1] > KNEES[1]:
            added += self._scale * knee2 * np.maximum(0, tokens - KNEES[1])
        return added

    def _unscaled(self, features: StepFeatures) -> float:
        base, token, knee1, knee2, request, context, one_pass = self._shape
        return (
            base
            + _cost_of(features.tokens, token, knee1, knee2)
            + request * features.requests
            + context * features.context_tokens
            + one_pass * features.draft_passes
        )

    def tokens_within(
        self, seconds: float, requests: int, context_tokens: int, most: int, draft_passes: int = 0
    ) -> int:
        """The most tokens, up to ``most``, of a step predicted to end within ``seconds``; may be 0."""
        base, *slopes, request, context, one_pass = self._shape
        fixed = base + request * requests + context * context_tokens + one_pass * draft_passes
        found = min(most, _tokens_for(seconds / self._scale - fixed, *slopes))
        # Nearly always right at once; rounding may have made it one too many.
        while found > 0 and self._scale * (fixed + _cost_of(found, *slopes)) > seconds:
            found -= 1
        return found

    def seconds_of_each(self, prompt_tokens: Numbers, context_tokens: Numbers) -> Seconds:
        """``seconds`` of many steps that hold one prompt each."""
        base, token, knee1, knee2, request, context, _ = self._shape
        each: Seconds = base + _costs_of(prompt_tokens, token, knee1, knee2) + request
        return self._scale * (each + context * context_tokens)

    def tokens_within_each(
        self, seconds: Seconds, requests: Numbers, context_tokens: Numbers, most: int
    ) -> Numbers:
        """``tokens_within`` of many steps."""
        base, *slopes, request, context, _ = self._shape
        fixed = base + request * requests + context * context_tokens
        found = np.minimum(most, _tokens_for_each(seconds / self._scale - fixed, *slopes))
        while (over := (found > 0) & (self._scale * (fixed + _costs_of(found, *slopes)) > seconds)).any():
            found[over] -= 1
        return found

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """A step took ``seconds``. What no clock that works can say is counted and ignored."""
        if not 0 < seconds < LONGEST_STEP_S or features.tokens <= 0:
            self.rejected_steps += 1
            return
        self._steps += 1
        self._errors.append(seconds / self.seconds(features) - 1.0)
        self._recent.append((features, seconds))
        self._ratios.append(seconds / self._unscaled(features))
        size = (features.tokens.bit_length(), features.context_tokens.bit_length() // 2)
        if size not in self._remembered:
            self._remembered[size] = deque(maxlen=REMEMBERED_PER_SIZE)
        self._remembered[size].append((self._steps, features, seconds))
        settled = self._steps >= SETTLED_STEPS
        if self._steps % (SETTLED_REFIT_STEPS if settled else REFIT_STEPS) == 0:
            self._refit()
        self._correct()

    @property
    def corrected(self) -> bool:
        """Whether enough steps were measured that predictions are more than a guess."""
        return len(self._ratios) >= LEAST_RATIOS

    def _correct(self) -> None:
        if self.corrected:
            median = sorted(self._ratios)[len(self._ratios) // 2]
            self._scale = min(LARGEST_CORRECTION, max(1 / LARGEST_CORRECTION, median))

    def _refit(self) -> None:
        """Fit the shape to what is remembered and, lightly, to the prior at the present scale."""
        points = [point for ring in self._remembered.values() for point in ring]
        ages = np.array([self._steps - step for step, _, _ in points], dtype=float)
        prior = [StepFeatures(*point) for point in PRIOR_POINTS]
        rows = np.array([columns(features) for features in (*(p[1] for p in points), *prior)])
        ratio = self._prior_ratio(points)
        values = np.concatenate([[p[2] for p in points], ratio * (rows[len(points) :] @ self._prior)])
        weights = np.concatenate([0.5 ** (ages / HALF_LIFE_STEPS), np.full(len(prior), PRIOR_WEIGHT)])
        start = self._scale * np.array(self._shape)
        shape = fit_robust(rows, values, weights, start, self._groups())
        if not np.isfinite(shape).all() or not shape[:2].any():
            return
        self._shape = tuple(float(value) for value in shape)
        self._ratios = deque(
            (seconds / max(1e-9, self._unscaled(features)) for features, seconds in self._recent), RECENT
        )
        behind = sorted(self._errors)[int(0.9 * (len(self._errors) - 1))]
        self.margin = 1.0 + min(LARGEST_MARGIN, max(0.0, behind))

    def _groups(self) -> list[slice]:
        """Where steps of one size stand among all that are remembered, for sizes seen often enough."""
        groups, start = [], 0
        for ring in self._remembered.values():
            if len(ring) >= LEAST_ALIKE:
                groups.append(slice(start, start + len(ring)))
            start += len(ring)
        return groups

    def _prior_ratio(self, points: list[tuple[int, StepFeatures, float]]) -> float:
        ratios = sorted(seconds / float(np.dot(columns(f), self._prior)) for _, f, seconds in points)
        return ratios[len(ratios) // 2]

    def error(self, quantile: float = 0.5) -> float:
        """Quantile of the relative error, without sign, of the last 128 predictions; 0 before the first."""
        if not self._errors:
            return 0.0
        ordered = sorted(abs(error) for error in self._errors)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]

    @property
    def coefficients(self) -> Profile:
        """What is believed now, as a profile that can be shipped."""
        base, token, knee1, knee2, request, context, one_pass = (self._scale * c for c in self._shape)
        return Profile(
            base_s=base,
            token_s=token,
            knees_s=(knee1, knee2),
            request_s=request,
            context_s=context,
            pass_s=one_pass,
            source=f"measured over {self._steps} steps",
        )


def _cost_of(tokens: int, token: float, knee1: float, knee2: float) -> float:
    """What tokens add to a step, before it is scaled: a slope that grows at each knee."""
    cost = token * tokens
    if tokens > KNEES[0]:
        cost += knee1 * (tokens - KNEES[0]) + knee2 * max(0, tokens - KNEES[1])
    return cost


def _tokens_for(cost: float, token: float, knee1: float, knee2: float) -> int:
    """The most tokens at that cost, 0 below 0: the inverse, segment by segment."""
    if cost < 0:
        return 0
    slope, start = token, 0
    for end, more in ((KNEES[0], knee1), (KNEES[1], knee2)):
        segment = slope * (end - start)
        if segment > cost:
            break
        cost, slope, start = cost - segment, slope + more, end
    return start + int(cost / slope + 1e-9) if slope > 0 else UNBOUNDED


def _costs_of(tokens: Numbers, token: float, knee1: float, knee2: float) -> Seconds:
    """``_cost_of`` of many."""
    cost = np.float64(token) * tokens
    if tokens.max(initial=0) > KNEES[0]:
        beyond = knee1 * (tokens - KNEES[0]) + knee2 * np.maximum(0, tokens - KNEES[1])
        cost = np.where(tokens > KNEES[0], cost + beyond, cost)
    return cost


def _tokens_for_each(cost: Seconds, token: float, knee1: float, knee2: float) -> Numbers:
    """``_tokens_for`` of many."""
    slope: float | Seconds = token
    start: int | Numbers = 0
    left, beyond, before = cost, cost >= 0, 0
    for end, more in ((KNEES[0], knee1), (KNEES[1], knee2)):
        segment = slope * (end - before)
        beyond = beyond & (left >= segment)
        if not beyond.any():
            break
        left = np.where(beyond, left - segment, left)
        slope, start, before = np.where(beyond, slope + more, slope), np.where(beyond, end, start), end
    with np.errstate(divide="ignore", invalid="ignore"):
        fit = np.fmin(left / slope + 1e-9, UNBOUNDED)
    found = start + np.fmax(fit, 0.0).astype(np.int64)
    return np.where(cost < 0, 0, np.where(slope > 0, found, UNBOUNDED))


def columns(features: StepFeatures) -> tuple[float, ...]:
    """The model's columns for one step, in the order of ``Profile.coefficients``."""
    tokens = features.tokens
    return (
        1.0,
        float(tokens),
        float(max(0, tokens - KNEES[0])),
        float(max(0, tokens - KNEES[1])),
        float(features.requests),
        float(features.context_tokens),
        float(features.draft_passes),
    )
