"""A step-time profile from steps that were measured, and how far it is off on others.

The fit is the one that corrects a profile while serving: robust, no coefficient below 0, by relative errors.
Draft passes are not measured here: ``pass_s`` stays 0 and is learned by whoever drafts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from penstock.schedulers.slo.nonnegative import fit_robust
from penstock.schedulers.slo.profiles import Profile, find_profile
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel, columns

LEAST_STEPS = 24
HELD_OUT = 4
"""Of so many steps one is not fitted."""
FIRST_GUESS = "h100-13b"


class MeasuredStep(NamedTuple):
    """A step, how long it took, and the batch it belongs to: steps of one batch with as many tokens and
    requests are alike.
    """

    features: StepFeatures
    seconds: float
    batch: int
    decodes: int
    """How many requests of the batch decode."""

    @property
    def kind(self) -> str:
        """What it computes, in words."""
        if self.features.tokens == self.features.requests:
            return "decodes"
        return "decodes and prompts" if self.decodes else "prompts"


class Errors(NamedTuple):
    """Relative errors, without sign, of so many predictions; ``seconds`` is the median step."""

    steps: int
    seconds: float
    median: float
    p90: float


def warmed_up(steps: Sequence[MeasuredStep]) -> list[MeasuredStep]:
    """All but the first of steps that are alike: an engine may compile for sizes that it meets first."""
    return [step for alike in _alike(steps) for step in (alike[1:] or alike)]


def split(steps: Sequence[MeasuredStep]) -> tuple[list[MeasuredStep], list[MeasuredStep]]:
    """Steps to fit, and a quarter of all to judge the fit by: every fourth, composition by composition."""
    fitted: list[MeasuredStep] = []
    held_out: list[MeasuredStep] = []
    for place, step in enumerate(step for alike in _alike(steps) for step in alike):
        (held_out if place % HELD_OUT == 0 else fitted).append(step)
    return fitted, held_out


def fit_profile(steps: Sequence[MeasuredStep], source: str = "") -> Profile:
    """The profile that fits ``steps`` best; ``source`` says where they are from.

    Raises:
        ValueError: too few steps, or all of one size: nothing can be told apart.
    """
    sizes = {step.features.tokens for step in steps}
    if len(steps) < LEAST_STEPS or len(sizes) < 3:
        raise ValueError(
            f"{len(steps)} steps of {len(sizes)} sizes were measured, needed: {LEAST_STEPS} of 3 sizes"
        )
    # Of steps that are alike the median one counts for all; what disturbs a step makes it longer.
    groups = _alike(steps)
    typical = [sorted(alike, key=lambda step: step.seconds)[(len(alike) - 1) // 2] for alike in groups]
    rows = np.array([columns(step.features) for step in typical])
    seconds = np.array([step.seconds for step in typical])
    weights = np.array([float(len(alike)) for alike in groups])
    guess = np.array(find_profile(FIRST_GUESS).coefficients)
    guess *= float(np.median(seconds / (rows @ guess)))
    base, token, knee1, knee2, request, context, _ = (
        float(value) for value in fit_robust(rows, seconds, weights, guess, rounds=32)
    )
    return Profile(
        base_s=base,
        token_s=token,
        knees_s=(knee1, knee2),
        request_s=request,
        context_s=context,
        source=source,
    )


def errors_by_kind(profile: Profile, steps: Sequence[MeasuredStep]) -> dict[str, Errors]:
    """How far ``profile`` is off, for each kind of step, and for ``all``."""
    model = StepTimeModel(profile)
    errors: defaultdict[str, list[float]] = defaultdict(list)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for step in steps:
        for kind in (step.kind, "all"):
            errors[kind].append(abs(step.seconds / model.seconds(step.features) - 1.0))
            seconds[kind].append(step.seconds)
    return {
        kind: Errors(
            steps=len(found),
            seconds=float(np.median(seconds[kind])),
            median=float(np.quantile(found, 0.5)),
            p90=float(np.quantile(found, 0.9)),
        )
        for kind, found in sorted(errors.items(), key=lambda item: (item[0] == "all", item[0]))
    }


def _alike(steps: Sequence[MeasuredStep]) -> list[list[MeasuredStep]]:
    """Steps of one composition, in the order in which they were measured."""
    found: defaultdict[tuple[int, int, int, int], list[MeasuredStep]] = defaultdict(list)
    for step in steps:
        tokens, requests, context, _ = step.features
        # Of a batch that fills up, every step differs; of one that is full, all but the context's last bits.
        found[step.batch, tokens, requests, context.bit_length()].append(step)
    return list(found.values())
