"""Robust least squares with coefficients that are never negative.

Lawson and Hanson's active-set method on the normal equations (a handful of columns, so they are cheap),
inside Huber's reweighting on relative errors: a step that took ten times as long as all like it counts a
tenth.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST_SPREAD = 0.02


def fit_robust(rows: Array, values: Array, weights: Array, rounds: int = 4) -> Array:
    """Coefficients ``[k] >= 0`` that minimise the weighted Huber loss of relative errors.

    ``rows`` is ``[n, k]``, ``values`` ``[n]`` above 0, ``weights`` ``[n]``. The spread of a normal error is
    the median of what the round before left.
    """
    relative, ones = rows / values[:, None], np.ones(len(values))
    trust = weights
    coefficients = np.zeros(rows.shape[1])
    for _ in range(rounds):
        coefficients = solve(relative, ones, trust)
        errors = np.abs(relative @ coefficients - ones)
        spread = 1.5 * max(SMALLEST_SPREAD, float(np.median(errors)))
        trust = weights * np.minimum(1.0, spread / np.maximum(errors, 1e-12))
    return coefficients


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
