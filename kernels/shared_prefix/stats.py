"""What shared prefixes saved in one worker."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.kernels.shared_prefix.runs import Run


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Totals since the start."""

    steps: int
    """Decode steps that read what is shared once."""
    stock_steps: int
    """Decode steps of several requests that saved too little."""
    runs: int
    """Runs of blocks that were read once, over ``steps``."""
    blocks: int
    """Blocks that requests have, over ``steps``."""
    blocks_read: int
    """How many of them were read, a shared one once."""
    searches: int
    """Times that runs were looked for; in other steps, tables had only grown."""
    planning_seconds: float
    """Time that looking for runs and laying out steps took, also of ``stock_steps``."""

    @property
    def saved_share(self) -> float:
        """Of ``blocks``, those that were not read again."""
        return 1 - self.blocks_read / self.blocks if self.blocks else 0.0

    def line(self) -> str:
        """For a log."""
        runs = self.runs / self.steps if self.steps else 0.0
        planned = self.steps + self.stock_steps
        each = 1e3 * self.planning_seconds / planned if planned else 0.0
        return (
            f"saved {100 * self.saved_share:.1f} % of block reads in {self.steps} steps, {runs:.1f} runs "
            f"each; {self.stock_steps} steps saved too little; planned in {each:.2f} ms each, "
            f"runs looked for {self.searches} times"
        )


class SharedPrefixStats:
    """Counts; one object a worker, not safe between threads."""

    def __init__(self) -> None:
        self._steps = self._stock = self._runs = self._blocks = self._saved = self._searches = 0
        self._seconds = 0.0

    @property
    def steps(self) -> int:
        """Decode steps that read what is shared once."""
        return self._steps

    def planned(
        self, runs: Sequence[Run], blocks: int, *, taken: bool, searched: int, seconds: float
    ) -> None:
        """A decode step over ``blocks`` was planned, in ``searched`` searches; ``taken``: it shares
        ``runs``."""
        self._searches += searched
        self._seconds += seconds
        if not taken:
            self._stock += 1
            return
        self._steps += 1
        self._runs += len(runs)
        self._blocks += blocks
        self._saved += sum(run.saved for run in runs)

    def snapshot(self) -> Snapshot:
        """All of it at this moment."""
        return Snapshot(
            steps=self._steps,
            stock_steps=self._stock,
            runs=self._runs,
            blocks=self._blocks,
            blocks_read=self._blocks - self._saved,
            searches=self._searches,
            planning_seconds=self._seconds,
        )
