"""A P/D pair of SGLang's page allocators, stock's and FlowKV's side by side, worn by the same requests.

No engine: SGLang's own allocator classes are called as its schedulers call them. Prefill computes in chunks
and keeps prompts in a prefix cache that gives up its oldest leaves; decode allocates a prompt's pages before
prefill begins, takes a page wherever a sequence fills one, and frees all at the end. Every call goes to both
allocators, so both see the same history, and what one refuses the other must.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from penstock.simulation.traces import CHUNK_TOKENS, TraceRequest

if TYPE_CHECKING:
    import torch

PAGE = 16
CACHED_PAGES = CHUNK_TOKENS // PAGE
PREFILL_PAGES = 12_000
DECODE_PAGES = 6_800
STEP_TOKENS = 8192
"""Prompt tokens that prefill computes in a step: SGLang's chunk."""
STEPS_A_CHUNK = 40
"""Tokens that each running sequence gets while prefill computes a chunk."""
BOTH = 2
"""Allocators of a pool: stock's and FlowKV's, in this order everywhere."""

Pages = tuple[list[int], list[int]]
"""The same positions of one sequence in stock's pool and in FlowKV's."""


class Diverged(RuntimeError):
    """One allocator refused what the other granted; from here on they have no common history."""


class Pool:
    """Stock's paged allocator and FlowKV's, of equal size, called alike. ``differences`` counts the calls
    that one of them refused alone."""

    def __init__(self, pages: int) -> None:
        import torch
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

        from penstock.plugins.sglang.run_allocator import RunPagedAllocator

        # An allocator asks its pool for nothing; FlowKV's leaves its counters there.
        self._all: list[Any] = [
            kind(pages * PAGE, PAGE, torch.float16, "cpu", _NoPool(), True)
            for kind in (PagedTokenToKVPoolAllocator, RunPagedAllocator)
        ]
        self.differences = 0
        self.refusals = 0

    @property
    def free_pages(self) -> int:
        """Pages that either has left."""
        return int(self._all[0].available_size()) // PAGE

    def extend(self, held: Pages, before: int, after: int) -> bool:
        """Append the pages of tokens ``before`` to ``after`` to both lists; False where there are none."""
        ends = [_tensor([before]), _tensor([after])]
        found = [
            allocator.alloc_extend(
                ends[0], ends[0], ends[1], ends[1], _tensor([_last(pages, before)]), after - before
            )
            for allocator, pages in zip(self._all, held, strict=True)
        ]
        if not self._agreed(found):
            return False
        for pages, tokens in zip(held, found, strict=True):
            pages.extend(_new_pages(tokens.numpy(), before))
        return True

    def step(self, sequences: Sequence[Decoding]) -> bool:
        """One more token for each sequence; False, and nothing happens, where there is no page for one."""
        lengths = _tensor([sequence.tokens + 1 for sequence in sequences])
        found = [
            allocator.alloc_decode(
                lengths, lengths, _tensor([_last(s.pages[side], s.tokens) for s in sequences])
            )
            for side, allocator in enumerate(self._all)
        ]
        if not self._agreed(found):
            return False
        for index, sequence in enumerate(sequences):
            if sequence.tokens % PAGE == 0:
                for side in range(BOTH):
                    sequence.pages[side].append(int(found[side][index]) // PAGE)
            sequence.tokens += 1
        return True

    def free(self, pages: Pages) -> None:
        """Give the pages back."""
        for allocator, ids in zip(self._all, pages, strict=True):
            allocator.free_page_ids(_tensor(ids))

    def _agreed(self, found: Sequence[torch.Tensor | None]) -> bool:
        refused = [tokens is None for tokens in found]
        self.refusals += refused[0]
        if refused[0] != refused[1]:
            self.differences += 1
            raise Diverged
        return not refused[0]


class _NoPool:
    epochs: npt.NDArray[np.uint32]


@dataclass(slots=True)
class Node:
    """Pages of one 512-token piece of a cached prompt."""

    pages: Pages
    parent: int | None
    children: int = 0
    users: int = 0
    used_at: int = 0


class PrefixCache:
    """Cached pieces of prompts by their identity; gives up the leaves that were longest in nobody's use."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._nodes: dict[int, Node] = {}
        self._clock = 0

    def match(self, pieces: Sequence[int]) -> Pages:
        """Pages of the longest cached prefix, which stays until it is released."""
        found: Pages = ([], [])
        for piece in self._known(pieces):
            node = self._nodes[piece]
            node.users += 1
            for side in range(BOTH):
                found[side].extend(node.pages[side])
        return found

    def release(self, pieces: Sequence[int], matched: int, pages: Pages) -> None:
        """A prompt's pages are its own no more: whole pieces that are new are kept, the rest is freed."""
        self._clock += 1
        for piece in pieces[:matched]:
            self._nodes[piece].users -= 1
            self._nodes[piece].used_at = self._clock
        whole = min(len(pieces), len(pages[0]) // CACHED_PAGES)
        rest: Pages = (pages[0][whole * CACHED_PAGES :], pages[1][whole * CACHED_PAGES :])
        for index in range(matched, whole):
            here = slice(index * CACHED_PAGES, (index + 1) * CACHED_PAGES)
            mine: Pages = (pages[0][here], pages[1][here])
            if pieces[index] in self._nodes:
                for side in range(BOTH):
                    rest[side].extend(mine[side])
                continue
            parent = pieces[index - 1] if index else None
            self._nodes[pieces[index]] = Node(mine, parent, used_at=self._clock)
            if parent is not None:
                self._nodes[parent].children += 1
        self._pool.free(rest)

    def evict(self, pages: int) -> bool:
        """Free pages until ``pages`` are free; False where the leaves do not suffice."""
        while self._pool.free_pages < pages:
            leaves = [
                (node.used_at, piece)
                for piece, node in self._nodes.items()
                if not node.children and not node.users
            ]
            if not leaves:
                return False
            for _, piece in sorted(leaves)[: max(1, (pages - self._pool.free_pages) // CACHED_PAGES)]:
                node = self._nodes.pop(piece)
                if node.parent is not None:
                    self._nodes[node.parent].children -= 1
                self._pool.free(node.pages)
        return True

    def _known(self, pieces: Sequence[int]) -> Iterator[int]:
        for piece in pieces:
            if piece not in self._nodes:
                return
            yield piece


@dataclass(slots=True)
class Decoding:
    """A sequence on the decode server."""

    request: TraceRequest
    pages: Pages = field(default_factory=lambda: ([], []))
    tokens: int = 0

    @property
    def is_done(self) -> bool:
        """Whether all its output is there."""
        return self.tokens >= self.request.input_tokens + self.request.output_tokens


@dataclass(frozen=True, slots=True)
class Sent:
    """One request's hand-over: for each chunk, source and target pages in stock's pools and in FlowKV's."""

    stock: list[tuple[list[int], list[int]]]
    flowkv: list[tuple[list[int], list[int]]]

    @property
    def pages(self) -> int:
        """Pages that moved."""
        return sum(len(source) for source, _ in self.stock)


class PrefillDecode:
    """The two servers; ``hand_overs`` yields every request that went from one to the other."""

    def __init__(self, prefill_pages: int, decode_pages: int) -> None:
        self.prefill, self.decode = Pool(prefill_pages), Pool(decode_pages)
        self._cache = PrefixCache(self.prefill)
        self._running: list[Decoding] = []
        self._longest = min(prefill_pages, decode_pages) * PAGE // 3

    def hand_overs(self, requests: Iterator[TraceRequest]) -> Iterator[Sent]:
        """Serve request after request; those that take more than a third of a pool are left out."""
        for request in requests:
            if request.input_tokens > self._longest:
                continue
            arriving = Decoding(request)
            while not self._has_room(request) or not self.decode.extend(
                arriving.pages, 0, request.input_tokens
            ):
                self._decode_steps()
            arriving.tokens = request.input_tokens
            yield self._prefill(request, arriving.pages)
            self._running.append(arriving)

    def _has_room(self, request: TraceRequest) -> bool:
        """Decode admits what leaves each running sequence some pages to grow by."""
        needed = -(-request.input_tokens // PAGE) + 4 * (len(self._running) + 1)
        return self.decode.free_pages >= needed

    def _prefill(self, request: TraceRequest, targets: Pages) -> Sent:
        pieces = request.chunks[: (request.input_tokens - 1) // CHUNK_TOKENS]
        pages = self._cache.match(pieces)
        matched = len(pages[0]) // CACHED_PAGES
        sent = Sent([], [])
        done, told = len(pages[0]) * PAGE, 0
        while done < request.input_tokens:
            after = min(done + STEP_TOKENS, request.input_tokens)
            needed = -(-(after - done) // PAGE) + 1
            if not self._cache.evict(needed) or not self.prefill.extend(pages, done, after):
                raise RuntimeError("the prefill pool is too small for its longest prompt")
            # A page that is not full yet goes with the next chunk.
            upto = len(pages[0]) if after == request.input_tokens else after // PAGE
            for chunks, source, target in zip((sent.stock, sent.flowkv), pages, targets, strict=True):
                chunks.append((source[told:upto], target[told:upto]))
            done, told = after, upto
            self._decode_steps()
        self._cache.release(pieces, matched, pages)
        return sent

    def _decode_steps(self) -> None:
        for _ in range(STEPS_A_CHUNK):
            if self._running and not self.decode.step(self._running):
                # As SGLang retracts, the youngest goes first.
                self.decode.free(self._running.pop().pages)
            for sequence in [s for s in self._running if s.is_done]:
                self.decode.free(sequence.pages)
                self._running.remove(sequence)


def hand_overs(
    requests: Iterator[TraceRequest],
    warm: int,
    measured: int,
    *,
    prefill_pages: int = PREFILL_PAGES,
    decode_pages: int = DECODE_PAGES,
) -> tuple[list[Sent], PrefillDecode]:
    """``measured`` hand-overs after ``warm`` others, and the pools that they went through; fewer where the
    allocators came to differ."""
    pair = PrefillDecode(prefill_pages, decode_pages)
    kept: deque[Sent] = deque(maxlen=measured)
    with contextlib.suppress(Diverged):
        kept.extend(islice(pair.hand_overs(requests), warm + measured))
    return list(kept), pair


def _tensor(values: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.int64)


def _last(pages: Sequence[int], tokens: int) -> int:
    return pages[(tokens - 1) // PAGE] * PAGE + (tokens - 1) % PAGE if tokens else -1


def _new_pages(tokens: npt.NDArray[np.int64], before: int) -> list[int]:
    first = -before % PAGE
    ids: list[int] = (tokens[first::PAGE] // PAGE).tolist()
    return ids
