"""Sparse decode attention of one layer: choice, attention over it, and an estimate of the rest.

Everything runs on the device from tensors that stand still: a CUDA graph captured around ``run`` holds as
long as the arguments are the same tensors, whatever is in them. There is no wait for the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.choose import ReadLists, choose
from penstock.kernels.triton.decode import Parts, decode_parts, estimate_parts, merge_parts
from penstock.kernels.triton.masses import exact_log_masses, page_log_masses
from penstock.kernels.triton.summaries import Summaries

SPLIT_TOKENS = 512
"""A part of a context is not made smaller than this: the merge would cost more than it hides."""
WAVES = 2
"""Programs a multiprocessor is to have."""
MOST_SPLITS = 64
MOST_HEAD_SIZE, MOST_PAGE_TOKENS = 256, 128
ALIGNED = 256
"""Bytes at whose multiples each tensor of a step begins."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """The most that a step may have: ``requests`` of ``pages`` each; ``heads`` KV heads of ``group`` query
    heads."""

    requests: int
    heads: int
    group: int
    head_size: int
    pages: int

    @property
    def rows(self) -> int:
        """Requests times KV heads."""
        return self.requests * self.heads


def splits_for(rows: int, tokens: int, processors: int) -> int:
    """Parts to cut contexts of at most ``tokens`` into, so that ``rows`` of them fill ``processors``."""
    enough = -(-WAVES * processors // max(1, rows))
    return max(1, min(enough, -(-tokens // SPLIT_TOKENS), MOST_SPLITS))


class _Carver:
    """Hands out tensors, new ones or pieces of ``memory`` (uint8 [n])."""

    def __init__(self, device: torch.device, memory: torch.Tensor | None) -> None:
        self._device, self._memory = device, memory
        self.taken = 0

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        first, size = self.taken, math.prod(shape) * dtype.itemsize
        self.taken += -(-size // ALIGNED) * ALIGNED
        if self._memory is None:
            return torch.empty(*shape, dtype=dtype, device=self._device)
        return self._memory[first : first + size].view(dtype).view(shape)


class SparseStep:
    """Choice and attention for steps of one shape; its memory is reserved once and shared by all layers.

    Args:
        config: what is read whatever it holds, and where reading is dense.
        shape: what tensors given to ``run`` have.
        cache: any cache of the kind that ``run`` gets.
        tail_pages: most pages at the end of a request whose masses are computed exactly; more are read, but
            not counted.
        processors: multiprocessors of the device.
        scale: of scores, one over the root of the head size if absent.
        memory: uint8, at least ``nbytes`` of it; steps of other shapes may use the same, not at one time.

    Raises:
        ValueError: a group rule that ``choose`` has not, or heads or pages that are too large for a program.
    """

    def __init__(
        self,
        config: ServingConfig,
        shape: StepShape,
        cache: PagedCache,
        *,
        tail_pages: int,
        processors: int,
        scale: float | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        if config.group_rule != "ranked":
            raise ValueError(f"group_rule: given {config.group_rule!r}, allowed on a GPU: 'ranked'")
        if shape.head_size > MOST_HEAD_SIZE:
            raise ValueError(f"head size: given {shape.head_size}, allowed: at most {MOST_HEAD_SIZE}")
        if cache.block_tokens > MOST_PAGE_TOKENS:
            raise ValueError(f"page tokens: given {cache.block_tokens}, allowed: at most {MOST_PAGE_TOKENS}")
        self.config, self.shape = config, shape
        self.scale = shape.head_size**-0.5 if scale is None else scale
        self._tokens = cache.block_tokens
        self._tail_pages = tail_pages
        self.splits = splits_for(shape.rows, shape.pages * self._tokens, processors)
        # A page is one row of an estimate, where it is many of what is read.
        self.rest_splits = splits_for(shape.rows, shape.pages, processors)
        take = _Carver(cache.keys.device, memory)
        rows, parts = shape.rows, self.splits + self.rest_splits
        self.logs = take(shape.requests, shape.heads, shape.group, shape.pages)
        self.reads = ReadLists(
            entries=take(rows, shape.pages, dtype=torch.int32),
            lengths=take(rows, dtype=torch.int32),
            taken=take(rows, shape.pages, dtype=torch.uint8),
            left=take(rows, shape.group),
        )
        self.parts = Parts(take(rows, parts, shape.group, shape.head_size), take(rows, parts, shape.group))
        self.lse = take(shape.requests, shape.heads, shape.group)
        self.nbytes = take.taken
        """Memory in bytes."""

    def run(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        index: Summaries,
        table: torch.Tensor,
        lengths: torch.Tensor,
        counts: torch.Tensor,
        wanted: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of ``query`` [B, H * G, D] into ``out``, alike.

        ``table`` int32 [B, P] and ``lengths`` int32 [B] are the block table and the tokens of the requests,
        0 for a padded one, whose output is 0; ``counts`` int32 [B] their pages that ``index`` has, full ones
        only, from the front; ``wanted`` float32 [1] the share of mass, with its margin.
        """
        self.choose(query, cache, index, table, lengths, counts, wanted)
        decode_parts(
            query, cache, self.reads, self.scale, self.parts, unit_tokens=self._tokens, splits=self.splits
        )
        estimate_parts(
            self.logs, self.reads.taken, index.values, table, counts, self.parts,
            first=self.splits, splits=self.rest_splits,
        )  # fmt: skip
        merge_parts(self.parts, self.shape.heads, out, self.lse)
        return out

    def choose(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        index: Summaries,
        table: torch.Tensor,
        lengths: torch.Tensor,
        counts: torch.Tensor,
        wanted: torch.Tensor,
    ) -> ReadLists:
        """The first half of ``run``, with the same arguments: which pages each row reads."""
        config = self.config
        sinks = -(-config.sink_tokens // self._tokens)
        # The query's own token is the last one: its page is read even if nothing else recent is asked for.
        recent = max(1, config.recent_tokens)
        page_log_masses(query, index, table, counts, self.scale, self.logs)
        exact_log_masses(
            query, cache, table, lengths, counts, self.scale, self.logs,
            sink_pages=sinks, recent_tokens=recent, tail_pages=self._tail_pages,
        )  # fmt: skip
        choose(
            self.logs, table, lengths, counts, wanted, self.reads,
            unit_tokens=self._tokens, block_tokens=self._tokens, sink_units=sinks, recent_tokens=recent,
            least_tokens=config.least_tokens, most_share=config.most_share,
        )  # fmt: skip
        return self.reads
