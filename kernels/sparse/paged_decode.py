"""The pages that one layer reads of a request in a decode step, over a paged KV cache of any engine."""

from __future__ import annotations

import random
import time
from typing import NamedTuple

import numpy as np
import torch

from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.fallback import Reason, reason_before
from penstock.kernels.sparse.head_rows import Read
from penstock.kernels.sparse.page_choice import choose_pages, measure, most_massive, page_shares, weigh
from penstock.kernels.sparse.paged_keys import Keys
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.serving_stats import ServingStats

BUILD_BLOCKS = 64
"""Blocks that are summarised at a time: bounds the copy of their keys."""
MOST_PATIENCE = 64


class Choice(NamedTuple):
    """``pages`` that are read, bool [H, P], and what they were chosen by: estimated ``shares`` of pages,
    float32 [H, G, P], in masses of which ``totals`` float32 [H, G] are the logs of the sums."""

    pages: torch.Tensor
    shares: torch.Tensor
    totals: torch.Tensor


class PagedDecode:
    """Chooses pages for one layer; what several layers learn together is passed in.

    Where KV heads together would read most pages, selection is left out for a growing number of steps, so
    that a layer that gains nothing costs nothing. Not safe between threads.
    """

    def __init__(
        self,
        config: ServingConfig,
        layer: int,
        index: BlockIndex,
        keys: Keys,
        calibration: Calibration,
        stats: ServingStats,
    ) -> None:
        self.config, self.layer, self.index = config, layer, index
        self._core = config.core()
        self._keys, self._calibration, self._stats = keys, calibration, stats
        self._random = random.Random(config.seed + layer)
        self._waits = self._patience = 0

    def pages(
        self, query: torch.Tensor, blocks: torch.Tensor, tokens: int, block_tokens: int
    ) -> torch.Tensor | None:
        """``choose``'s pages."""
        choice = self.choose(query, blocks, tokens, block_tokens)
        return None if choice is None else choice.pages

    def read(self, query: torch.Tensor, blocks: torch.Tensor, tokens: int, block_tokens: int) -> Read:
        """What ``choose`` says is read, and what stands for the rest."""
        choice = self.choose(query, blocks, tokens, block_tokens)
        return self.reading(choice, blocks, tokens - (len(blocks) - 1) * block_tokens)

    def reading(self, choice: Choice | None, blocks: torch.Tensor, tail: int) -> Read:
        """What is read of ``blocks``, with ``tail`` tokens in the last one, after a ``choice``."""
        if choice is None or not self.index.has_values:
            return Read(blocks, None if choice is None else choice.pages, tail)
        rest = self.index.rest(blocks[:-1], choice.shares, choice.pages, choice.totals)
        return Read(blocks, choice.pages, tail, rest)

    def choose(
        self, query: torch.Tensor, blocks: torch.Tensor, tokens: int, block_tokens: int
    ) -> Choice | None:
        """The pages that each KV head reads for ``query`` [H, G, D], multiplied by the softmax scale.

        ``blocks`` (int64 [P]) hold the ``tokens`` of the request, the query's own among them. The last page
        is always read; None is where all heads read everything.
        """
        reason = self._dense_before(tokens)
        if reason is not None:
            self._stats.dense(reason)
            return None
        began = time.perf_counter()
        built = self.summarise(blocks[:-1])
        tail = tokens - (len(blocks) - 1) * block_tokens
        always = self._always(tokens, block_tokens)
        logs = self._log_masses(query, blocks, always, tail)
        shares, kept, totals = weigh(logs, always)
        chosen = self._choose(shares, kept)
        read, nothing_saved = self._widen(chosen)
        self._be_patient(nothing_saved)
        self._stats.chosen(self.layer, read, chosen.numel(), time.perf_counter() - began - built)
        if self._is_measured():
            self._measure(query, blocks, tail, shares, kept, chosen)
        return None if nothing_saved else Choice(chosen, shares, totals)

    def _dense_before(self, tokens: int) -> Reason | None:
        reason = reason_before(self._core, self.layer, tokens)
        if reason is None and self.config.mass == 1:
            return Reason.NOTHING_SAVED
        if reason is None and self._waits:
            self._waits -= 1
            return Reason.NOTHING_SAVED
        return reason

    def _be_patient(self, nothing_saved: bool) -> None:
        self._patience = min(max(1, 2 * self._patience), MOST_PATIENCE) if nothing_saved else 0
        self._waits = self._patience

    def summarise(self, blocks: torch.Tensor) -> float:
        """Take the summaries that are missing; returns the seconds it took."""
        missing = self.index.missing(blocks)
        if not len(missing):
            return 0.0
        began = time.perf_counter()
        for some in missing.split(BUILD_BLOCKS):
            values = self._keys.read_values(some) if self.index.has_values else None
            self.index.put(some, self._keys.read(some), values)
        took = time.perf_counter() - began
        self._stats.indexed(len(missing), took)
        return took

    def _log_masses(
        self, query: torch.Tensor, blocks: torch.Tensor, always: torch.Tensor, tail: int
    ) -> torch.Tensor:
        """Logs of page masses [H, G, P], exact for the pages ``always``."""
        logs = torch.empty(*query.shape[:2], len(blocks))
        self.index.log_masses(query, blocks[:-1], logs)
        self._keys.log_masses(query, blocks, always, tail, logs)
        return logs

    def _always(self, tokens: int, block_tokens: int) -> torch.Tensor:
        """Pages with tokens that are read whatever they hold, and the last one; int64, ascending."""
        pages = -(-tokens // block_tokens)
        recent = max(0, tokens - max(1, self.config.recent_tokens)) // block_tokens
        sinks = min(recent, -(-self.config.sink_tokens // block_tokens))
        return torch.tensor([*range(sinks), *range(recent, pages)])

    def _choose(self, shares: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        heads, _, pages = shares.shape
        if self.config.budget is not None:
            return most_massive(shares, kept, int(self.config.budget * pages))
        asked = torch.full((heads,), self._calibration.ask(self.layer))
        return choose_pages(self.config.group_rule, shares, kept, asked)

    def _widen(self, chosen: torch.Tensor) -> tuple[int, bool]:
        """Have heads that would read most pages read all; returns the pages that are read then, of all heads,
        and whether that is so many that nothing is saved, and all are.

        Heads that need everything make the others' savings too small for what choosing costs.
        """
        heads, pages = chosen.shape
        taken = np.count_nonzero(chosen.numpy(), axis=1).tolist()
        counts = [pages if count > self.config.most_share * pages else count for count in taken]
        nothing_saved = sum(counts) > self.config.most_share * heads * pages
        for head, count in enumerate(counts):
            if nothing_saved or count == pages:
                chosen[head] = True
        return heads * pages if nothing_saved else sum(counts), nothing_saved

    def _is_measured(self) -> bool:
        # Until the margin rests on measurements, every step makes one.
        share = self.config.calibration_share
        return share > 0 and (not self._calibration.settled(self.layer) or self._random.random() < share)

    def _measure(
        self,
        query: torch.Tensor,
        blocks: torch.Tensor,
        tail: int,
        shares: torch.Tensor,
        kept: torch.Tensor,
        chosen: torch.Tensor,
    ) -> None:
        began = time.perf_counter()
        head = self._random.randrange(len(query))
        one = slice(head, head + 1)
        logs = torch.empty(1, query.shape[1], len(blocks))
        self._keys.log_masses(query[one], blocks, torch.arange(len(blocks)), tail, logs, one)
        exact = page_shares(logs)[0]
        needed = measure(self.config.group_rule, self.config.mass, shares[head], exact, kept[head])
        for attained, margin in zip((exact * chosen[head]).sum(-1).tolist(), needed, strict=True):
            self._calibration.measured(self.layer, attained, margin)
            if not chosen[head].all():
                # What reads everything attains everything: it must not hide what the others attain.
                self._stats.measured(attained)
        self._stats.measuring(time.perf_counter() - began)
