# ruff: noqa: ANN001, ANN202
"""What a step did, written down on the device: totals of every step, and one row in full where asked.

The host never waits for either. It fetches both later (``AsyncCopy``), and names the row to sample before a
step, so that a captured graph need not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.choose import ReadLists
from penstock.kernels.triton.launch import power, products_in_fp32, tile, warps
from penstock.kernels.triton.masses import exact_log

TOTALS = ("rows", "pages_read", "pages", "short_rows")
"""Columns: (request, KV head) in which pages were chosen, pages that they read and have, and those whose
context was too short to choose."""
NOBODY = -1
ROWS = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """One row (request and KV head) of a layer's step, and who is to be sampled.

    ``ticket`` int32 [2] has the layer, ``NOBODY`` for none, and the row. ``facts`` int32 [4] are the layer
    that wrote, ``NOBODY`` before one has; the row; its tokens; its pages with a summary. ``estimated`` and
    ``exact`` float32 [G, P] are logs of masses, ``taken`` uint8 [P].
    """

    ticket: torch.Tensor
    facts: torch.Tensor
    estimated: torch.Tensor
    exact: torch.Tensor
    taken: torch.Tensor

    @classmethod
    def empty(cls, group: int, pages: int, device: torch.device) -> Sample:
        """Room for a row; nobody is asked for."""
        return cls(
            torch.full((2,), NOBODY, dtype=torch.int32, device=device),
            torch.full((4,), NOBODY, dtype=torch.int32, device=device),
            torch.zeros(group, pages, device=device),
            torch.zeros(group, pages, device=device),
            torch.zeros(pages, dtype=torch.uint8, device=device),
        )

    def ask(self, layer: int, row: int) -> None:
        """Have ``row`` of ``layer`` written down in the next step; the host does not wait."""
        self.facts.fill_(NOBODY)
        self.ticket[0].fill_(layer)
        self.ticket[1].fill_(row)

    def close(self) -> None:
        """Have nothing more written, so that it can be fetched."""
        self.ticket.fill_(NOBODY)


@triton.jit
def _tally(lengths, read, totals, rows, heads, block_tokens, least_tokens, ROWS: tl.constexpr):
    chosen = 0
    pages_read = 0
    pages = 0
    short = 0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        length = tl.load(lengths + row // heads, mask=row < rows, other=0)
        listed = tl.load(read + row, mask=row < rows, other=0)
        long = (length >= least_tokens) & (length > 0)
        chosen += tl.sum(long.to(tl.int32), 0)
        short += tl.sum(((length > 0) & (length < least_tokens)).to(tl.int32), 0)
        pages_read += tl.sum(tl.where(long, (listed + block_tokens - 1) // block_tokens, 0), 0)
        pages += tl.sum(tl.where(long, (length + block_tokens - 1) // block_tokens, 0), 0)
    tl.store(totals, tl.load(totals) + chosen)
    tl.store(totals + 1, tl.load(totals + 1) + pages_read)
    tl.store(totals + 2, tl.load(totals + 2) + pages)
    tl.store(totals + 3, tl.load(totals + 3) + short)


@triton.jit
def _observe(
    query, keys, table, lengths, counts, logs, taken, read, totals, ticket, facts, estimated, exact, marks,
    layer, rows, heads, group, size, pages, block_tokens, least_tokens, scale,
    query_request, query_head, key_block, key_token, key_head,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, FP32: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    page = tl.program_id(0)
    if page == 0:
        _tally(lengths, read, totals, rows, heads, block_tokens, least_tokens, ROWS)
    if tl.load(ticket) == layer:
        row = tl.load(ticket + 1).to(tl.int64)
        request = row // heads
        length = tl.load(lengths + request)
        if page == 0:
            tl.store(facts, layer)
            tl.store(facts + 1, row.to(tl.int32))
            tl.store(facts + 2, length)
            tl.store(facts + 3, tl.load(counts + request))
        if page * block_tokens < length:
            log = exact_log(
                query, keys, table, request, row % heads, page, length,
                group, size, pages, block_tokens, scale,
                query_request, query_head, key_block, key_token, key_head, GROUP, TOKENS, SIZE, FP32,
            )  # fmt: skip
            member = tl.arange(0, GROUP)
            inside = member < group
            tl.store(exact + member * pages + page, log, mask=inside)
            guess = tl.load(logs + (row * group + member) * pages + page, mask=inside, other=0.0)
            tl.store(estimated + member * pages + page, guess, mask=inside)
            tl.store(marks + page, tl.load(taken + row * pages + page))


def observe(
    query: torch.Tensor,
    cache: PagedCache,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    logs: torch.Tensor,
    reads: ReadLists,
    sample: Sample,
    totals: torch.Tensor,
    *,
    layer: int,
    least_tokens: int,
) -> None:
    """Add what ``choose`` did to ``totals`` (int64 [4], as ``TOTALS``), and fill ``sample`` if it asks for
    ``layer``. The rest is as ``SparseStep.run`` has it; ``logs`` float32 [B, H, G, P]."""
    requests, heads, group, pages = logs.shape
    keys = cache.keys
    _observe[(pages,)](
        query, keys, table, lengths, counts, logs, reads.taken, reads.lengths, totals,
        sample.ticket, sample.facts, sample.estimated, sample.exact, sample.taken,
        layer, requests * heads, heads, group, cache.head_size, pages, cache.block_tokens,
        least_tokens, scale,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        GROUP=tile(group), TOKENS=tile(cache.block_tokens), SIZE=tile(cache.head_size),
        FP32=products_in_fp32(query, keys), ROWS=min(ROWS, power(requests * heads)),
        num_warps=warps(tile(cache.block_tokens) * tile(cache.head_size)),
    )  # fmt: skip


class AsyncCopy:
    """Tensors of a device as the host can read them a little later; the host never waits.

    On a CPU a copy is there at once.
    """

    def __init__(self, sources: dict[str, torch.Tensor]) -> None:
        self._sources = sources
        on_device = next(iter(sources.values())).is_cuda
        self._here = {
            name: torch.empty(one.shape, dtype=one.dtype, pin_memory=on_device)
            for name, one in sources.items()
        }
        self._event = torch.cuda.Event() if on_device else None
        self._pending = False

    @property
    def pending(self) -> bool:
        """A copy was started and not taken."""
        return self._pending

    def start(self) -> None:
        """Copy what the device will have once it has done what it was given so far."""
        for name, source in self._sources.items():
            self._here[name].copy_(source, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._pending = True

    def take(self) -> dict[str, torch.Tensor] | None:
        """What was copied, until the next ``start``; None where it is not there yet."""
        if not self._pending or (self._event is not None and not self._event.query()):
            return None
        self._pending = False
        return self._here
