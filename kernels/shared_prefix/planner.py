"""Decides, step by step, what is read once for several requests."""

from __future__ import annotations

import time

from penstock.kernels.shared_prefix.config import SharedPrefixConfig
from penstock.kernels.shared_prefix.layout import Layout, lay_out
from penstock.kernels.shared_prefix.runs import Counts, RunKeeper, Tables
from penstock.kernels.shared_prefix.stats import SharedPrefixStats


class PrefixPlanner:
    """Plans decode steps over one pool of blocks of ``block_tokens``, for ``heads`` KV heads of ``group``
    query heads. Not safe between threads."""

    def __init__(
        self,
        config: SharedPrefixConfig,
        stats: SharedPrefixStats,
        *,
        block_tokens: int,
        heads: int,
        group: int,
    ) -> None:
        self._config, self._stats = config, stats
        self._block_tokens, self._heads, self._group = block_tokens, heads, group
        self._keeper = RunKeeper(least_blocks=config.least_blocks, least_requests=config.least_requests)

    def plan(self, tables: Tables, tokens: Counts, threads: int) -> Layout | None:
        """The step for requests with ``tokens`` [B] each in the blocks of ``tables`` [B, P]; None where too
        little is saved."""
        if len(tokens) < self._config.least_requests:
            return None
        began = time.perf_counter()
        before = self._keeper.searches
        runs = self._keeper.runs(tables, tokens // self._block_tokens)
        blocks = int((-(-tokens // self._block_tokens)).sum())
        saved = sum(run.saved for run in runs)
        taken = saved > 0 and saved >= self._config.least_share * blocks
        found = None
        if taken:
            found = lay_out(
                tables,
                tokens,
                runs,
                block_tokens=self._block_tokens,
                heads=self._heads,
                group=self._group,
                threads=threads,
            )
        searched = self._keeper.searches - before
        took = time.perf_counter() - began
        self._stats.planned(runs, blocks, taken=taken, searched=searched, seconds=took)
        return found
