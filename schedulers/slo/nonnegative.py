"""Robust least squares with coefficients that are never negative.

Lawson and Hanson's active-set method on the normal equations (a handful of columns, so they are cheap),
inside a reweighting by relative errors: a step that took ten times as long as all like it hardly counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST_SPREAD = 0.02


def fit_robust(
    rows: Array, values: Array, weights: Array, start: Array, groups: Sequence[slice] = (), rounds: int = 8
) -> Array:
    """Coefficients ``[k] >= 0`` that fit best what is no outlier, by errors relative to the prediction.

    ``rows`` is ``[n, k]``, ``values`` ``[n]`` above 0, ``weights`` ``[n]``, ``start`` ``[k]`` a guess. An
    outlier in one of ``groups`` (of rows that are alike) is one that differs from the others of its group:
    where a whole group differs from the guess, the guess is wrong. Rows of no group are judged by the fit.
    The spread of a normal error is taken from the median one.
    """
    coefficients = start
    trust = weights.copy()
    alone = np.ones(len(values), dtype=bool)
    errors = np.log(values / np.maximum(rows @ start, 1e-9))
    for group in groups:
        errors[group] -= np.median(errors[group])
        alone[group] = False
    if groups:
        trust[~alone] *= _trust(np.abs(errors[~alone]))
    for _ in range(rounds):
        predicted = np.maximum(rows @ coefficients, 1e-9)
        relative = values / predicted
        judged = np.where(alone, trust * _trust(np.abs(np.log(relative))), trust)
        found = solve(rows / predicted[:, None], relative, judged)
        if not found.any():
            return coefficients
        if np.allclose(found, coefficients, rtol=1e-4, atol=0):
            return found
        coefficients = found
    return coefficients


def _trust(errors: Array) -> Array:
    """1 for normal errors, falling with the square of the others."""
    spread = 1.5 * max(SMALLEST_SPREAD, float(np.median(errors)))
    trust: Array = np.minimum(1.0, spread / np.maximum(errors, 1e-12)) ** 2
    return trust


def solve(rows: Array, values: Array, weights: Array) -> Array:
    """The ``x >= 0`` that minimises ``sum(weights * (rows @ x - values)**2)``; of many, one that is small."""
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-12)
    scaled = rows / scale
    weighted = scaled * weights[:, None]
    count = rows.shape[1]
    gram = scaled.T @ weighted + 1e-9 * np.eye(count) * max(1e-12, float(weights.sum()))
    target = weighted.T @ values
    x = np.zeros(count)
    free = np.zeros(count, dtype=bool)
    for _ in range(3 * count):
        gradient = target - gram @ x
        gradient[free] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10 * max(1e-12, float(np.abs(target).max())):
            break
        free[best] = True
        x = _inner(gram, target, x, free)
    found: Array = x / scale
    return found


def _inner(gram: Array, target: Array, x: Array, free: NDArray[np.bool_]) -> Array:
    """Move towards the minimum on the free columns, fixing at 0 each one that would turn negative."""
    while free.any():
        wanted = np.zeros(len(x))
        wanted[free] = np.linalg.solve(gram[np.ix_(free, free)], target[free])
        negative = free & (wanted <= 0)
        if not negative.any():
            return wanted
        steps = x[negative] / (x[negative] - wanted[negative] + 1e-300)
        x = x + float(steps.min()) * (wanted - x)
        free &= x > 1e-14
        x[~free] = 0.0
    return np.zeros(len(x))
