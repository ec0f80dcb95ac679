"""How far a share may be believed: what was followed once by a token need not be followed by it again.

Shares are counts of few cases. Whether drafts that rested on as much came true is seen a step later, whoever
verified them, so the share is corrected by what was true of its like: matches of about the same length.
"""

from __future__ import annotations

LONGEST_BUCKET = 6
PRIOR_WEIGHT = 2.0
MOST_WEIGHT = 2000.0


class Trust:
    """Turns shares into probabilities."""

    def __init__(self) -> None:
        size = LONGEST_BUCKET + 1
        # A longer match is the better reason: m tokens are as m cases for, with one against.
        rates = [length / (length + 1) for length in (1 << bucket for bucket in range(size))]
        self._true = [PRIOR_WEIGHT * rate for rate in rates]
        self._said = [PRIOR_WEIGHT] * size

    def probability(self, share: float, matched: int) -> float:
        """That the token comes next which followed in ``share`` of the cases, after ``matched`` tokens."""
        bucket = min(matched.bit_length() - 1, LONGEST_BUCKET)
        return share * min(1.0, self._true[bucket] / self._said[bucket])

    def observe(self, share: float, matched: int, *, came: bool) -> None:
        """The token came next, or another one did."""
        bucket = min(matched.bit_length() - 1, LONGEST_BUCKET)
        self._said[bucket] += share
        self._true[bucket] += came
        if self._said[bucket] > MOST_WEIGHT:
            self._said[bucket] /= 2
            self._true[bucket] /= 2
