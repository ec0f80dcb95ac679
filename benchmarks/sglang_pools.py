"""Memory of a P/D pair of SGLang, worn by requests: page allocators, stock's or FlowKV's, and radix cache.

No engine: SGLang's own classes are called as its schedulers call them. Prefill computes in chunks and keeps
prompts in the cache; decode allocates a prompt's pages before prefill begins, takes a page wherever a
sequence fills one, and frees all at the end. What is granted depends on the requests alone, so that pairs
with different allocators can be compared request by request.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from penstock.connectors.runs import Run, runs_of
from penstock.simulation.traces import CHUNK_TOKENS, TraceRequest

if TYPE_CHECKING:
    import torch

PAGE = 16
PREFILL_PAGES = 12_000
DECODE_PAGES = 6_800
STEP_TOKENS = 8192
"""Prompt tokens that prefill computes in a step: SGLang's chunk."""
STEPS_A_CHUNK = 40
"""Tokens that each running sequence gets while prefill computes a chunk."""
STOCK, FLOWKV, PAIRED = "stock", "FlowKV", "FlowKV, paired"
NO_SPARE, NO_SPARE_PAIRED = "FlowKV, no spare pages", "FlowKV, no spare pages, paired"
"""Who hands pages out: SGLang, FlowKV, and what FlowKV could do instead: fill windows at prefill with whole
runs of decode's; free no more pages than it needs."""
Chunks = list[tuple[list[int], list[int]]]
"""One request's hand-over: for each chunk, its pages at prefill and at decode."""


class _NoPool:
    """An allocator asks its pool for nothing; FlowKV's leaves its counters there."""

    epochs: npt.NDArray[np.uint32]


def make_allocator(name: str, pages: int) -> Any:
    """A page allocator of SGLang's interface."""
    import torch

    return _kinds()[name](pages * PAGE, PAGE, torch.float16, "cpu", _NoPool(), True)


def _kinds() -> Mapping[str, type[Any]]:
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    from penstock.connectors.allocator import RunAllocator
    from penstock.plugins.sglang.run_allocator import CONFIG, RunPagedAllocator

    class PairedRuns(RunAllocator):
        peer: Sequence[Run] = ()

        def allocate(self, count: int, key: object | None = None, position: int = 0) -> list[int]:
            if key is not None and self.peer:
                self.announce(key, position + count, self.peer)
            return super().allocate(count, key, position)

    class Paired(RunPagedAllocator):
        _runs: PairedRuns

        def clear(self) -> None:
            super().clear()
            self._runs = PairedRuns(self.num_pages + 1, CONFIG)
            self._runs.release(range(1, self.num_pages + 1), worthless=True)

        def pair_with(self, peer: Sequence[Run]) -> None:
            self._runs.peer = peer

    class NoSpare(RunPagedAllocator):
        spare = 0.0

    class NoSparePaired(Paired):
        spare = 0.0

    return {
        STOCK: PagedTokenToKVPoolAllocator,
        FLOWKV: RunPagedAllocator,
        PAIRED: Paired,
        NO_SPARE: NoSpare,
        NO_SPARE_PAIRED: NoSparePaired,
    }


@dataclass(slots=True)
class Prompt:
    """A prompt that is being computed: its tokens, where those that are computed lie, and its hold on the
    cached ones, which are the first ``cached``."""

    tokens: array[int]
    slots: torch.Tensor
    cached: int
    lock: Any


class PrefillPool:
    """Pages of a prefill server, and the prefixes that SGLang's radix cache keeps in them."""

    def __init__(self, allocator: Any) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.allocator = allocator
        self.cache = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=allocator,
                page_size=PAGE,
                tree_components=(ComponentType.FULL,),
            )
        )

    def begin(self, tokens: array[int]) -> Prompt:
        """Hold the longest cached prefix; SGLang computes one token at least."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        found = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(tokens[:-1]))).last_device_node
        slots = self.cache.path_device_indices(found)
        return Prompt(tokens, slots, len(slots), self.cache.lock(found))

    def extend(self, prompt: Prompt, after: int) -> None:
        """Compute the prompt up to its token ``after``, and keep that in the cache.

        Raises:
            RuntimeError: the pool is too small.
        """
        import torch
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        before = len(prompt.slots)
        self.allocator.evict_to_free_tokens(self.cache, after - before + PAGE)
        new = extend(self.allocator, prompt.slots, after)
        if new is None:
            raise RuntimeError("the prefill pool is too small for its longest prompt")
        slots, whole = torch.cat([prompt.slots, new]), after // PAGE * PAGE
        node = self.cache.insert(
            InsertParams(
                key=RadixKey(prompt.tokens[:whole]),
                value=slots[:whole].clone(),
                prev_prefix_len=prompt.cached,
            )
        ).last_device_node
        prompt.slots = torch.cat([self.cache.path_device_indices(node), slots[whole:]])
        prompt.cached = whole
        lock = self.cache.lock(node)
        self.cache.unlock(prompt.lock)
        prompt.lock = lock

    def end(self, prompt: Prompt) -> None:
        """The cache may give the prompt up; the page that is not full is free."""
        self.allocator.free(prompt.slots[prompt.cached :])
        self.cache.unlock(prompt.lock)


@dataclass(slots=True)
class Decoding:
    """A sequence on the decode server."""

    pages: list[int]
    tokens: int
    goal: int


@dataclass(slots=True)
class DecodePool:
    """Pages of a decode server. ``granted`` has what was said to each call."""

    allocator: Any
    running: list[Decoding] = field(default_factory=list)
    granted: list[bool] = field(default_factory=list)

    def take(self, request: TraceRequest) -> Decoding:
        """Pages for the prompt, once those who run have ended enough of what they do."""
        while not (self._has_room(request) and (pages := self._pages(request.input_tokens))):
            self.step()
        return Decoding(pages, request.input_tokens, request.input_tokens + request.output_tokens)

    def step(self) -> None:
        """One more token for each sequence. Where there is no page, the youngest goes, as SGLang retracts."""
        if self.running:
            lengths = _tensor([s.tokens + 1 for s in self.running])
            lasts = _tensor([s.pages[-1] * PAGE + (s.tokens - 1) % PAGE for s in self.running])
            found = self.allocator.alloc_decode(lengths, lengths, lasts)
            self.granted.append(found is not None)
            if found is None:
                self._free(self.running.pop())
            else:
                for sequence, slot in zip(self.running, found.tolist(), strict=True):
                    if sequence.tokens % PAGE == 0:
                        sequence.pages.append(slot // PAGE)
                    sequence.tokens += 1
        for sequence in [s for s in self.running if s.tokens >= s.goal]:
            self._free(sequence)
            self.running.remove(sequence)

    def active(self) -> float:
        """Share of the pages that are in use."""
        pages: int = self.allocator.num_pages
        return 1 - self.allocator.available_size() / PAGE / pages

    def _has_room(self, request: TraceRequest) -> bool:
        """Decode admits what leaves each running sequence some pages to grow by."""
        needed = -(-request.input_tokens // PAGE) + 4 * (len(self.running) + 1)
        return bool(self.allocator.available_size() // PAGE >= needed)

    def _pages(self, tokens: int) -> list[int]:
        found = extend(self.allocator, _tensor([]), tokens)
        self.granted.append(found is not None)
        return [] if found is None else pages_of(found)

    def _free(self, sequence: Decoding) -> None:
        self.allocator.free_page_ids(_tensor(sequence.pages))


@dataclass(slots=True)
class Served:
    """What one pair did for the measured requests."""

    hand_overs: list[Chunks] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    active: list[float] = field(default_factory=list)
    """Share of decode's pages in use, after each admission."""
    granted: list[bool] = field(default_factory=list)
    """What decode's allocator said to each call since the start."""


def serve(
    name: str,
    requests: Iterator[TraceRequest],
    warm: int,
    measured: int,
    *,
    prefill_pages: int = PREFILL_PAGES,
    decode_pages: int = DECODE_PAGES,
) -> Served:
    """``measured`` requests after ``warm`` others through a pair with allocators of that name.

    Those that take more than a third of a pool are left out.
    """
    prefill = PrefillPool(make_allocator(name, prefill_pages))
    decode = DecodePool(make_allocator(STOCK if name == STOCK else FLOWKV, decode_pages))
    longest = min(prefill_pages, decode_pages) * PAGE // 3
    served = Served(granted=decode.granted)
    short = (request for request in requests if request.input_tokens <= longest)
    for number, request in enumerate(islice(short, warm + measured)):
        arriving = decode.take(request)
        cached, chunks = _prefill(prefill, request, arriving.pages)
        if number >= warm:
            served.hand_overs.append(chunks)
            served.prompt_tokens += request.input_tokens
            served.cached_tokens += cached
            served.active.append(decode.active())
        # Others decode meanwhile, as long whatever was cached: decode's pool sees the same everywhere.
        for _ in range(STEPS_A_CHUNK * -(-request.input_tokens // STEP_TOKENS)):
            decode.step()
        decode.running.append(arriving)
    return served


def _prefill(pool: PrefillPool, request: TraceRequest, targets: list[int]) -> tuple[int, Chunks]:
    """Cached tokens of the prompt, and its chunks."""
    if pair_with := getattr(pool.allocator, "pair_with", None):
        pair_with(runs_of(targets))
    prompt = pool.begin(tokens_of(request))
    cached, told = prompt.cached, 0
    chunks: Chunks = []
    while (done := len(prompt.slots)) < request.input_tokens:
        after = min(done + STEP_TOKENS, request.input_tokens)
        pool.extend(prompt, after)
        pages = pages_of(prompt.slots)
        # A page that is not full yet goes with the next chunk.
        upto = len(pages) if after == request.input_tokens else after // PAGE
        chunks.append((pages[told:upto], targets[told:upto]))
        told = upto
    pool.end(prompt)
    return cached, chunks


def tokens_of(request: TraceRequest) -> array[int]:
    """Tokens that are equal where the pieces of the trace are."""
    tokens = array("q")
    for piece in request.chunks:
        tokens.extend([piece] * CHUNK_TOKENS)
    return tokens[: request.input_tokens]


def extend(allocator: Any, slots: torch.Tensor, after: int) -> torch.Tensor | None:
    """New slots of a sequence whose tokens so far lie in ``slots``, up to its token ``after``."""
    before, last = len(slots), int(slots[-1]) if len(slots) else -1
    ends = _tensor([before]), _tensor([after])
    found: torch.Tensor | None = allocator.alloc_extend(
        ends[0], ends[0], ends[1], ends[1], _tensor([last]), after - before
    )
    return found


def pages_of(slots: torch.Tensor) -> list[int]:
    """Pages of a sequence's slots."""
    pages: list[int] = (slots[::PAGE] // PAGE).tolist()
    return pages


def _tensor(values: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.int64)
