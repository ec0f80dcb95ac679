"""The pages that one layer reads of a request in a decode step, over a paged KV cache of any engine."""

from __future__ import annotations

import random
import time
from typing import Protocol

import torch

from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.fallback import Reason, reason_before
from penstock.kernels.sparse.page_choice import choose_pages, exact_log_masses, measure, page_shares
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.serving_stats import ServingStats

BUILD_BLOCKS = 64
"""Blocks that are summarised at a time: bounds the copy of their keys."""
MOST_PATIENCE = 64


class Keys(Protocol):
    """Keys of a layer's KV cache, whatever their order in memory."""

    def read(self, blocks: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """Keys [H, P, N, D] of ``blocks`` (int64 [P]) and of ``heads``; slots that were never written hold
        anything."""


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
        """The pages that each KV head reads for ``query`` [H, G, D], multiplied by the softmax scale.

        ``blocks`` (int64 [P]) hold the ``tokens`` of the request, the query's own among them. Returns bool
        [H, P], the last page always true, or None where all heads read everything.
        """
        reason = self._dense_before(tokens)
        if reason is not None:
            self._stats.dense(reason)
            return None
        began = time.perf_counter()
        built = self._summarise(blocks[:-1])
        tail = tokens - (len(blocks) - 1) * block_tokens
        always = self._always(len(blocks), tokens, block_tokens)
        logs, kept = self._log_masses(query, blocks, always, tail)
        shares = page_shares(logs)
        wanted = torch.full(shares.shape[:2], self._calibration.ask(self.layer))
        chosen = choose_pages(self.config.group_rule, shares, kept, wanted)
        whole = chosen.sum(1) > self.config.most_share * len(blocks)
        chosen |= whole[:, None]
        # Heads that need everything make the others' savings too small for what choosing costs.
        nothing_saved = int(chosen.sum()) > self.config.most_share * chosen.numel()
        if nothing_saved:
            chosen[:] = True
        self._be_patient(nothing_saved)
        self._stats.chosen(self.layer, int(chosen.sum()), chosen.numel(), time.perf_counter() - began - built)
        if self._is_measured():
            self._measure(query, blocks, tail, shares, kept, chosen)
        return None if nothing_saved else chosen

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

    def _summarise(self, blocks: torch.Tensor) -> float:
        """Take the summaries that are missing; returns the seconds it took."""
        missing = self.index.missing(blocks)
        if not len(missing):
            return 0.0
        began = time.perf_counter()
        for some in missing.split(BUILD_BLOCKS):
            self.index.put(some, self._keys.read(some))
        took = time.perf_counter() - began
        self._stats.indexed(len(missing), took)
        return took

    def _always(self, pages: int, tokens: int, block_tokens: int) -> torch.Tensor:
        """Pages with tokens that are read whatever they hold, and the last one; bool [P]."""
        page = torch.arange(pages)
        recent = max(0, tokens - max(1, self.config.recent_tokens)) // block_tokens
        return (page * block_tokens < self.config.sink_tokens) | (page >= recent)

    def _log_masses(
        self, query: torch.Tensor, blocks: torch.Tensor, always: torch.Tensor, tail: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logs of page masses [H, G, P], exact where ``always``, and pages that are read anyway, bool [H, P].

        Those that are not finite are among them, so that NaN shows where dense attention shows it.
        """
        logs = torch.empty(*query.shape[:2], len(blocks))
        logs[..., :-1] = self.index.log_masses(query, blocks[:-1])
        logs[..., always] = exact_log_masses(query, self._keys.read(blocks[always]), tail)
        return logs, always | ~logs.isfinite().all(1)

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
        exact = page_shares(exact_log_masses(query[one], self._keys.read(blocks, one), tail))[0]
        needed = measure(self.config.group_rule, self.config.mass, shares[head], exact, kept[head])
        for attained, margin in zip((exact * chosen[head]).sum(-1).tolist(), needed, strict=True):
            self._calibration.measured(self.layer, attained, margin)
            if not chosen[head].all():
                # What reads everything attains everything: it must not hide what the others attain.
                self._stats.measured(attained)
        self._stats.measuring(time.perf_counter() - began)
