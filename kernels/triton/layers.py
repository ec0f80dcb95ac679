"""Sparse decode for the layers of a model whose blocks are the same, on one device, for any engine.

An engine calls ``written`` where a layer's keys were written, ``attend`` in decode steps, both of which a
CUDA graph may capture, and ``between_steps`` before each step, outside of graphs. None waits for the device.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.page_choice import measure, page_shares, weigh
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.serving_stats import ServingStats
from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.index import DeviceIndex, clusters_within
from penstock.kernels.triton.observe import NOBODY, TOTALS, AsyncCopy, Sample, observe
from penstock.kernels.triton.step import WAVES, SparseStep, StepShape
from penstock.kernels.triton.summaries import Summaries

MOST_STEP_BYTES = 512 * 2**20
"""What a step may take besides the index; more requests than it holds are dense."""
CATCH_UP_PAGES = 64
"""Pages a request and step that are summarised late: at 16 tokens, 128k are done within 128 steps."""
FETCH_STEPS = 64
SAMPLE_STEPS = 8
"""At least, between two samples: to make something of one takes the host milliseconds."""


class Plan(NamedTuple):
    """``requests`` of the largest step that is sparse, and the ``nbytes`` that its memory takes."""

    requests: int
    nbytes: int


def plan(config: ServingConfig, shape: StepShape, cache: PagedCache, processors: int) -> Plan:
    """How much of ``shape`` fits in ``MOST_STEP_BYTES``; ``cache`` may be on the meta device."""
    part = shape.group * (shape.head_size + 1) * 4
    nothing = _elsewhere(cache)

    def nbytes(requests: int) -> int:
        fewer = replace(shape, requests=requests)
        step = SparseStep(config, fewer, nothing, tail_pages=1, processors=processors)
        # Fewer requests are cut into more parts, until there are as many programs as fill the device.
        return step.nbytes + 2 * WAVES * processors * part

    sizes = range(1, shape.requests + 1)
    most = max(1, bisect_right(sizes, MOST_STEP_BYTES, key=nbytes))
    return Plan(most, nbytes(most))


def summary_bytes(config: ServingConfig, cache: PagedCache) -> int:
    """What the summary of one block takes; ``cache`` may be on the meta device."""
    clusters = clusters_within(cache, config.summary_tokens)
    return Summaries.empty(_elsewhere(cache), clusters).nbytes


def _elsewhere(cache: PagedCache) -> PagedCache:
    """One block like those of ``cache``, without memory."""
    nothing = torch.empty(1, *cache.keys.shape[1:], dtype=cache.keys.dtype, device="meta")
    return PagedCache(nothing, nothing)


class SparseLayers:
    """Indexes, margins and memory of sparse layers; not safe between threads, nor between streams.

    Args:
        config: what is read, and where attention is dense.
        shape: the most that a step may have.
        caches: of each sparse layer, by its number in the model; all alike.
        calibration: margins; the object of the worker.
        stats: where counts go.
        scale: of scores.
        processors: multiprocessors of the device.
        foreign: blocks are filled by others than ``written`` hears of, by a KV connector for one.

    Raises:
        ValueError: what ``SparseStep`` refuses.
    """

    def __init__(
        self,
        config: ServingConfig,
        shape: StepShape,
        caches: Mapping[int, PagedCache],
        calibration: Calibration,
        stats: ServingStats,
        *,
        scale: float,
        processors: int,
        foreign: bool,
    ) -> None:
        one = next(iter(caches.values()))
        device, blocks = one.keys.device, len(one.keys)
        self.config, self.shape = config, shape
        self._caches, self._calibration, self._stats = caches, calibration, stats
        self._scale, self._processors, self._foreign = scale, processors, foreign
        self._step_of = lru_cache(maxsize=None)(self._step)
        self.requests, size = plan(config, shape, one, processors)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._known = torch.zeros(len(caches), blocks, dtype=torch.uint8, device=device)
        clusters = clusters_within(one, config.summary_tokens)
        self._indexes = {
            layer: DeviceIndex(paged, clusters, config.summary_rounds, known)
            for (layer, paged), known in zip(caches.items(), self._known, strict=True)
        }
        self._places = {layer: place for place, layer in enumerate(caches)}
        self._counts = torch.zeros(self.requests, dtype=torch.int32, device=device)
        asked = [calibration.ask(layer) for layer in caches]
        self._wanted = torch.tensor(asked, dtype=torch.float32, device=device)
        self._totals = torch.zeros(len(caches), len(TOTALS), dtype=torch.int64, device=device)
        self._told = torch.zeros(len(caches), len(TOTALS), dtype=torch.int64)
        self._totals_copy = AsyncCopy({"totals": self._totals})
        self._sample = Sample.empty(shape.group, shape.pages, device)
        self._sample_copy = AsyncCopy(
            {name: getattr(self._sample, name) for name in ("facts", "estimated", "exact", "taken")}
        )
        self._random = random.Random(config.seed)
        self._asked = False
        self._steps = 0
        self._sampled_at = -SAMPLE_STEPS

    @property
    def index_bytes(self) -> int:
        """What summaries take, of all layers."""
        return sum(index.nbytes for index in self._indexes.values())

    @property
    def step_bytes(self) -> int:
        """What a step takes besides, shared by all layers."""
        return self._memory.nbytes

    @property
    def blocks(self) -> int:
        """How many blocks it can tell apart."""
        return self._known.shape[1]

    def forget(self, blocks: torch.Tensor) -> None:
        """Drop the summaries of ``blocks`` (int64 [P], anywhere): others than ``written`` fill them."""
        self._known.index_fill_(1, blocks.to(self._known.device, non_blocking=True), 0)

    def written(self, layer: int, slots: torch.Tensor) -> None:
        """``DeviceIndex.written`` of ``layer``."""
        self._indexes[layer].written(slots)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
    ) -> bool:
        """Decode attention of ``query`` [B, H * G, D] into ``out``, alike; False, and nothing done, where
        there are more requests, or tables of another width, than there is memory for.

        ``table`` int32 [B, P] and ``lengths`` int32 [B] are as ``SparseStep.run`` has them.
        """
        requests, pages = table.shape
        if requests > self.requests or pages != self.shape.pages:
            return False
        step, index, place = self._step_of(requests), self._indexes[layer], self._places[layer]
        counts = self._counts[:requests]
        index.count(table, lengths, counts)
        if self._foreign:
            index.catch_up(table, lengths, counts, CATCH_UP_PAGES)
        paged = self._caches[layer]
        wanted = self._wanted[place : place + 1]
        step.run(query, paged, index.summaries, table, lengths, counts, wanted, out)
        observe(
            query, paged, table, lengths, counts, step.scale, step.logs, step.reads, self._sample,
            self._totals[place], layer=layer, least_tokens=self.config.least_tokens,
        )  # fmt: skip
        return True

    def between_steps(self, requests: int) -> None:
        """Take what earlier steps left for the host, and say what the next one is to leave, in which
        ``requests`` may be sparse."""
        self._steps += 1
        if (totals := self._totals_copy.take()) is not None:
            self._tell(totals["totals"])
        elif not self._totals_copy.pending and self._steps % FETCH_STEPS == 0:
            self._totals_copy.start()
        if self._asked:
            self._asked = False
            self._sample.close()
            self._sample_copy.start()
        if (sample := self._sample_copy.take()) is not None:
            self._measure(**sample)
        due = self._steps - self._sampled_at >= SAMPLE_STEPS
        if due and not self._sample_copy.pending and 0 < requests <= self.requests:
            self._ask(requests)

    def _step(self, requests: int) -> SparseStep:
        one = next(iter(self._caches.values()))
        return SparseStep(
            self.config,
            replace(self.shape, requests=requests),
            one,
            tail_pages=self.config.recent_tokens // one.block_tokens + 2,
            processors=self._processors,
            scale=self._scale,
            memory=self._memory,
        )

    def _tell(self, totals: torch.Tensor) -> None:
        heads = self.shape.heads
        for layer, row in zip(self._caches, (totals - self._told).tolist(), strict=True):
            now = dict(zip(TOTALS, row, strict=True))
            self._stats.tallied(
                layer,
                selections=now["rows"] // heads,
                read=now["pages_read"],
                of=now["pages"],
                short=now["short_rows"] // heads,
            )
        self._told = totals.clone()

    def _ask(self, requests: int) -> None:
        """Maybe have a row sampled: always until every margin rests on measurements."""
        share = self.config.calibration_share
        unsettled = [layer for layer in self._caches if not self._calibration.settled(layer)]
        if share and (unsettled or self._random.random() < share * len(self._caches)):
            layer = self._random.choice(unsettled or list(self._caches))
            self._sample.ask(layer, self._random.randrange(requests * self.shape.heads))
            self._asked, self._sampled_at = True, self._steps

    def _measure(
        self, facts: torch.Tensor, estimated: torch.Tensor, exact: torch.Tensor, taken: torch.Tensor
    ) -> None:
        layer, _, length, count = facts.tolist()
        size = next(iter(self._caches.values())).block_tokens
        pages = -(-length // size)
        # A row that pads a batch, a step that was dense, or a context that nothing was chosen of.
        if layer == NOBODY or length < max(1, self.config.least_tokens):
            return
        recent = min(max(0, length - max(1, self.config.recent_tokens)) // size, count)
        sinks = min(recent, -(-self.config.sink_tokens // size))
        always = torch.tensor([*range(sinks), *range(recent, pages)])
        shares, kept, _ = weigh(estimated[None, :, :pages].clone(), always)
        found = page_shares(exact[None, :, :pages])[0]
        needed = measure("ranked", self.config.mass, shares[0], found, kept[0])
        read = taken[:pages].bool()
        for attained, margin in zip((found * read).sum(-1).tolist(), needed, strict=True):
            self._calibration.measured(layer, attained, margin)
            if not read.all():
                # What reads everything attains everything: it must not hide what the others attain.
                self._stats.measured(attained)
        self._wanted[self._places[layer]].fill_(self._calibration.ask(layer))
