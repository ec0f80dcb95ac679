"""How much more mass must be asked for so that what was promised is attained, learned by measuring."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence

from penstock.kernels.sparse.config import SparseConfig

LEAST, MOST = -2.0, 6.0
"""Bounds of a margin: at 0.9, asking for 0.55 and for 0.9997."""


def with_margin(mass: float, margin: float) -> float:
    """``mass`` moved by ``margin`` in units of log(P / (1 - P)); 1 stays 1."""
    return mass / (mass + (1 - mass) * math.exp(-margin))


def needed_margin(asked: Sequence[float], attained: Sequence[float], mass: float) -> float:
    """The least margin with which a query head attains ``mass``, within ``LEAST`` and ``MOST``.

    ``attained`` are the exact masses that it has where the selector is asked for the shares ``asked``,
    ascending and below 1; between two of them, the share that would have been enough is interpolated.
    """
    before: tuple[float, float] | None = None
    for share, had in zip(asked, attained, strict=True):
        if had >= mass:
            found = share
            if before is not None:
                found = before[0] + (share - before[0]) * (mass - before[1]) / max(had - before[1], 1e-9)
            return min(max(_log_odds(found) - _log_odds(mass), LEAST), MOST)
        before = share, had
    return MOST


def _log_odds(share: float) -> float:
    share = min(max(share, 1e-9), 1 - 1e-9)
    return math.log(share / (1 - share))


class Calibration:
    """Margins of each layer, so that a share of (query head, step) attains the mass.

    The margin is a conformal quantile: that of the margins which recent measurements would have needed. If
    steps were exchangeable, it would hold for a new one with at least the share (Vovk, Gammerman and Shafer
    2005); they drift, so that the window forgets. One object a worker; not safe between threads.
    """

    def __init__(self, config: SparseConfig) -> None:
        self._config = config
        self._random = random.Random(config.seed)
        self._needed: dict[int, deque[float]] = {}
        self._attained: dict[int, deque[float]] = {}

    def sampled(self, query_heads: int) -> list[int]:
        """Query heads to measure in this layer and step."""
        share = self._config.calibration_share
        return [head for head in range(query_heads) if self._random.random() < share]

    def settled(self, layer: int) -> bool:
        """Whether measurements of ``layer`` are enough for the quantile that its margin is; those that say
        nothing of the margin count, so that a layer that needs none is not measured for ever."""
        measured = len(self._attained.get(layer, ()))
        return math.ceil((measured + 1) * self._config.attained_share) <= measured

    def measured(self, layer: int, attained: float, needed: float | None) -> None:
        """Take one measurement: the exact mass of what was read, and ``needed_margin``.

        ``needed`` is None where what is read whatever it weighs had the mass, which it has with any margin.
        Counted as the least one, such measurements of most steps would leave no margin to the few that need
        one; without them, the quantile is of those.
        """
        window = self._config.calibration_window
        self._attained.setdefault(layer, deque(maxlen=window)).append(attained)
        if needed is not None:
            self._needed.setdefault(layer, deque(maxlen=window)).append(needed)

    def margin(self, layer: int) -> float:
        """The margin of ``layer``; while measurements are few, no less than the configured one."""
        needed = sorted(self._needed.get(layer, ()))
        rank = math.ceil((len(needed) + 1) * self._config.attained_share)
        if rank > len(needed):
            return max([self._config.margin, *needed[-1:]])
        return needed[rank - 1] + self._config.spare_margin

    def ask(self, layer: int) -> float:
        """The share of mass to ask a selector for."""
        return with_margin(self._config.mass, self.margin(layer))

    def attained(self, layer: int, shares: Sequence[float] = (0.1, 0.5)) -> tuple[float, ...] | None:
        """Quantiles of the measured mass, P10 and P50 if nothing else is asked; None before a measurement."""
        masses = sorted(self._attained.get(layer, ()))
        if not masses:
            return None
        return tuple(masses[min(int(share * len(masses)), len(masses) - 1)] for share in shares)
