"""Draft lengths for one step, and whether to draft at all: the tokens that are worth most for their time.

A draft token is worth the probability that it is reached and accepted, times what a token is worth to its
request: more while the request is behind its pace, less once it is not. That falls along a draft, so the best
``d`` tokens of a batch are the first ``d`` of all when sorted by worth; a step with the best ``d`` is
compared for every ``d``. SLOs-Serve's lengths for each tier (its speculative planner) are the case in which
only the pace counts.

Where drafts gain too little there is none, but a short one of one request now and then; where they pay and
their cost is unsure, there is a step without them now and then. Both take at most a set share of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from penstock.schedulers.acceptance_table import AcceptanceTable, Floats, Ints

PROBE_TOKENS = 2
MOST_CREDIT_S = 1.0
Unsure = Callable[[int], bool]


class Chosen(NamedTuple):
    """Draft tokens of each row, and by what share they raise worth a second."""

    lengths: Ints
    gain: float


def worth(survival: Floats, needed: Floats, spare: float) -> Floats:
    """What each draft token is worth, ``[rows, positions]``: 1 times its probability until a row is expected
    to get the tokens that it needs of the step (the sure one included), ``spare`` times it after."""
    values: Floats = spare * survival
    paced = np.flatnonzero(needed)
    if len(paced):
        reached = survival[paced]
        before = 1.0 + np.cumsum(reached, axis=1) - reached
        values[paced] = np.where(before < needed[paced, None] - 1e-9, reached, values[paced])
    return values


def fastest_lengths(values: Floats, rest: Floats, seconds: Floats) -> Chosen:
    """The lengths with the most worth a second.

    Args:
        values: ``[rows, positions]``, worth of each draft token; rows fall, 0 where there is no token.
        rest: ``[most + 1]``, what else the step is worth with 0, 1, ... ``most`` draft tokens.
        seconds: ``[most + 1]``, its time.
    """
    ordered = np.sort(values, axis=None)[::-1][: len(rest) - 1]
    total = rest[: len(ordered) + 1].copy()
    total[1:] += np.cumsum(ordered)
    rate = total / seconds[: len(total)]
    best = int(np.argmax(rate))
    if best == 0 or rate[0] <= 0 or ordered[best - 1] <= 0:
        return Chosen(np.zeros(len(values), dtype=np.int64), 0.0)
    return Chosen(_first(values, best, float(ordered[best - 1])), float(rate[best] / rate[0]) - 1.0)


def rates_by_depth(values: Floats, rest: Floats, seconds: Floats, pass_s: float) -> Floats:
    """``[positions]``: the most worth a second with drafts of up to 1, 2, ... tokens; each position after
    the first costs the whole batch ``pass_s`` seconds.

    The first pass is no choice: a drafter with a KV cache of its own makes it whatever is asked of it. Other
    arguments are those of ``fastest_lengths``.
    """
    positions, most = values.shape[1], len(rest) - 1
    order = np.argsort(-values, axis=None)
    ordered, places = values.ravel()[order], order % positions
    depths = np.arange(positions)[:, None]
    taken = places <= depths
    number = np.cumsum(taken, axis=1)
    worths = np.cumsum(ordered * taken, axis=1)
    worths[number > most] = 0.0
    number = np.minimum(number, most)
    rate = (worths + rest[number]) / (seconds[number] + pass_s * depths)
    without: Floats = rest[0] / (seconds[0] + pass_s * depths[:, 0])
    best: Floats = np.maximum(rate.max(axis=1), without)
    return best


def _first(values: Floats, number: int, least: float) -> Ints:
    """Lengths with the ``number`` most valuable tokens, of which the last is worth ``least``."""
    lengths: Ints = (values >= least).sum(axis=1)
    surplus = int(lengths.sum()) - number
    if surplus:
        equal = np.flatnonzero(values == least)[-surplus:]
        lengths -= np.bincount(equal // values.shape[1], minlength=len(values))
    return lengths


class DraftLengths:
    """Draft lengths for each step, and what came of them."""

    def __init__(
        self,
        most_tokens: int,
        *,
        spare_worth: float,
        least_gain: float,
        probe_share: float,
    ) -> None:
        self.table = AcceptanceTable(most_tokens)
        self._spare_worth = spare_worth
        self._least_gain = least_gain
        self._probe_share = probe_share
        self._credit_s = 0.0
        self._probed: dict[int, int] = {}
        self.depth = most_tokens
        """Passes that the drafter should make at the end of the step."""
        self.probes = 0
        self.served_s = self.probing_s = 0.0

    def lengths(
        self,
        rows: Ints,
        available: Ints,
        needed: Floats,
        *,
        rest: Floats,
        seconds: Floats,
        unsure: Unsure = lambda drafted: False,
        pass_s: float = 0.0,
        unsure_of_passes: Unsure = lambda passes: False,
    ) -> Ints:
        """Draft tokens of each row.

        Args:
            rows: ``[n]``, rows of the table whose requests may draft.
            available: ``[n]``, draft tokens that there are for each.
            needed: ``[n]``, tokens that each needs of the step for its pace; 0 where it has none.
            rest, seconds: as in ``fastest_lengths``; their length bounds the draft tokens of the step.
            unsure: whether it is unclear what so many draft tokens cost.
            pass_s: time that a pass of the drafter takes; 0 leaves ``depth`` alone.
            unsure_of_passes: whether it is unclear what so many passes cost.
        """
        self.served_s += float(seconds[0])
        self._credit_s = min(MOST_CREDIT_S, self._credit_s + self._probe_share * float(seconds[0]))
        if len(rows) == 0 or len(rest) < 2:
            return np.zeros(len(rows), dtype=np.int64)
        values = worth(self.table.survival(rows), needed, self._spare_worth)
        if pass_s > 0:
            self._deepen(values, rest, seconds, pass_s, unsure_of_passes)
            seconds = seconds + pass_s * (self.depth - 1)
        values[np.arange(self.table.most_tokens) >= available[:, None]] = 0.0
        chosen = fastest_lengths(values, rest, seconds)
        if chosen.gain >= self._least_gain:
            if self._credit_s > 0 and unsure(int(chosen.lengths.sum())):
                self._spend(float(seconds[0]) * chosen.gain / (1.0 + chosen.gain))
                return np.zeros(len(rows), dtype=np.int64)
            return chosen.lengths
        return self._probe(rows, available, seconds)

    def _deepen(self, values: Floats, rest: Floats, seconds: Floats, pass_s: float, unsure: Unsure) -> None:
        """Choose the passes for the next step as if it were as this one is."""
        rates = rates_by_depth(values, rest, seconds, pass_s)
        best = int(np.argmax(rates))
        if rates[best] < (1.0 + self._least_gain) * rest[0] / seconds[0]:
            best = 0
        deepest = len(rates) - 1
        if self._credit_s > 0 and deepest and unsure(deepest):
            other = 0 if best else deepest
            self._spend(float(seconds[0]) * max(0.0, 1.0 - float(rates[other] / rates[best])))
            best = other
        self.depth = 1 + best

    def _probe(self, rows: Ints, available: Ints, seconds: Floats) -> Ints:
        """A draft of the request that was probed least, if there is credit for its whole cost."""
        lengths = np.zeros(len(rows), dtype=np.int64)
        cost_s = float(seconds[min(PROBE_TOKENS, len(seconds) - 1)] - seconds[0])
        if not 0 < cost_s <= self._credit_s:
            return lengths
        self._probed = {int(row): self._probed.get(int(row), 0) for row in rows}
        chosen = min(range(len(rows)), key=lambda index: (self._probed[int(rows[index])], index))
        tokens = min(PROBE_TOKENS, int(available[chosen]), len(seconds) - 1)
        if tokens:
            self._spend(float(seconds[tokens] - seconds[0]))
            self._probed[int(rows[chosen])] += 1
            lengths[chosen] = tokens
        return lengths

    def _spend(self, cost_s: float) -> None:
        self._credit_s -= cost_s
        self.probing_s += cost_s
        self.probes += 1
