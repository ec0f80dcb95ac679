"""Two ways of attention on the same prompts: what one loses to the other, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.benchmarks.report import Cell

SURE = 0.95


class Pairs(msgspec.Struct, frozen=True):
    """Scores, from 0 to 1, of the same prompts in the same order."""

    dense: Sequence[float]
    sparse: Sequence[float]

    @property
    def lost(self) -> float:
        """Mean of what ``sparse`` scores less; negative if more."""
        return sum(self._gaps) / len(self.dense)

    @property
    def worse(self) -> int:
        """Prompts with a lower score."""
        return sum(gap > 0 for gap in self._gaps)

    @property
    def better(self) -> int:
        """Prompts with a higher score."""
        return sum(gap < 0 for gap in self._gaps)

    def most_lost(self) -> float:
        """What ``sparse`` loses at most, with ``SURE``: Clopper and Pearson's upper bound of the share of
        prompts that it answers worse, each counted as lost altogether.

        Prompts count as drawn independently; those that share a context are not quite.
        """
        from scipy.stats import beta

        if self.worse == len(self.dense):
            return 1.0
        return float(beta.ppf(SURE, self.worse + 1, len(self.dense) - self.worse))

    def __add__(self, other: Pairs) -> Pairs:
        """The prompts of both."""
        return Pairs([*self.dense, *other.dense], [*self.sparse, *other.sparse])

    def cells(self) -> dict[str, Cell]:
        """Columns of a row."""
        return {
            "prompts": len(self.dense),
            "dense": sum(self.dense) / len(self.dense),
            "sparse": sum(self.sparse) / len(self.sparse),
            "worse": self.worse,
            "better": self.better,
            "lost": self.lost,
            "lost at most": self.most_lost(),
        }

    @property
    def _gaps(self) -> list[float]:
        return [ours - theirs for ours, theirs in zip(self.dense, self.sparse, strict=True)]


def together(pairs: Sequence[Pairs]) -> Pairs:
    """All prompts of a non-empty sequence."""
    first, *rest = pairs
    for one in rest:
        first += one
    return first
