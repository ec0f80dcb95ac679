"""Steps vLLM's real ``KVCacheManager`` through prefill, decode, preemption and abort, without a model.

Real are the manager, its block pool, prefix cache and ``Request``; made up are token ids, block hashes and
the scheduler, which is first come first served with a token budget a step. A decoding request asks for
slots when it needs a block, not at every token: the calls in between change nothing in the pool.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from penstock.connectors.runs import Run, runs_of, slice_runs
from penstock.simulation.traces import CHUNK_TOKENS, TraceRequest

BLOCK_TOKENS = 16
LENGTH_DIVISOR = 4
"""Trace lengths are divided by this, so that pools of some thousand blocks hold tens of requests."""
CHUNK_BLOCKS = CHUNK_TOKENS // LENGTH_DIVISOR // BLOCK_TOKENS


def make_manager(num_blocks: int) -> KVCacheManager:
    """A prefix-caching manager of one full-attention group with ``num_blocks`` blocks."""
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float16)
    config = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    return KVCacheManager(
        config, max_model_len=65536, scheduler_block_size=BLOCK_TOKENS, hash_block_size=BLOCK_TOKENS
    )


def make_request(name: str, row: TraceRequest) -> Request:
    """A vLLM request with the row's scaled length, whose blocks hash as the row's chunks say."""
    tokens = max(2, row.input_tokens // LENGTH_DIVISOR)
    own = name.encode()
    chunks = row.chunks

    def hash_blocks(request: Request) -> list[BlockHash]:
        first, last = len(request.block_hashes), request.num_tokens // BLOCK_TOKENS
        prompt_blocks = tokens // BLOCK_TOKENS
        return [
            BlockHash(
                (chunks[i // CHUNK_BLOCKS] * CHUNK_BLOCKS + i % CHUNK_BLOCKS).to_bytes(32, "little")
                if i < prompt_blocks
                else own + i.to_bytes(8, "little")
            )
            for i in range(first, last)
        ]

    params = SamplingParams(max_tokens=max(1, row.output_tokens // LENGTH_DIVISOR))
    return Request(name, [0] * tokens, params, None, arrival_time=0.0, block_hasher=hash_blocks)


def _nothing(*_: object) -> None:
    """A callback that nobody needs."""


@dataclass(slots=True)
class Sequence:
    """A request inside an engine. ``hit_blocks`` came from the prefix cache, the rest was handed out."""

    request: Request
    abort_at: int
    row: TraceRequest
    hit_blocks: int = 0
    block_ids: list[int] = field(default_factory=list)
    preempted: bool = False

    @property
    def prompt_blocks(self) -> int:
        return -(-self.request.num_prompt_tokens // BLOCK_TOKENS)

    @property
    def new_runs(self) -> list[Run]:
        """Ascending runs over the blocks that were handed out, in token order."""
        return runs_of(self.block_ids[self.hit_blocks :])

    def again(self) -> Sequence:
        """The same request as another engine gets it: nothing computed yet."""
        return Sequence(make_request(self.request.request_id, self.row), self.abort_at, self.row)


@dataclass(slots=True)
class Tally:
    """What an engine counted since the last reset."""

    finished: list[list[Run]] = field(default_factory=list)
    prompt_tokens: int = 0
    hit_tokens: int = 0
    active: list[float] = field(default_factory=list)
    preemptions: int = 0
    wrongly_refused: int = 0


class Engine:
    """One KV cache manager and the requests that run on it.

    ``announce(request_id, blocks, sender_runs)`` is called before a request's first allocation, ``forget``
    after its end. With ``on_prefilled`` set, the engine only prefills, gives each sequence away and keeps its
    blocks until ``release``; ``on_load`` is told of each sequence that came with a sender's runs.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        *,
        step_tokens: int = 1024,
        chunk_tokens: int = 512,
        most_running: int = 64,
        announce: Callable[[str, int, list[Run]], None] = _nothing,
        forget: Callable[[str], None] = _nothing,
    ) -> None:
        self.manager = manager
        self.tally = Tally()
        self.running: list[Sequence] = []
        self.waiting: deque[tuple[Sequence, list[Run]]] = deque()
        self.on_load: Callable[[Sequence, list[Run]], None] = _nothing
        self._step_tokens = step_tokens
        self._chunk_tokens = chunk_tokens
        self._most_running = most_running
        self._announce = announce
        self._forget = forget
        self.on_prefilled: Callable[[Sequence], None] | None = None

    def submit(self, sequence: Sequence, sender_runs: list[Run] | None = None) -> None:
        """Queue a sequence; with ``sender_runs`` its prompt is loaded from a sender, not computed."""
        self.waiting.append((sequence, sender_runs or []))
        self._announce(sequence.request.request_id, sequence.prompt_blocks, sender_runs or [])

    def step(self) -> None:
        """One scheduler step: decode what runs, go on with chunked prompts, admit what fits."""
        budget = self._step_tokens
        for sequence in list(self.running):
            if budget <= 0:
                break
            if sequence in self.running:
                budget -= self._advance(sequence, budget)
        while self.waiting and budget > 0 and len(self.running) < self._most_running:
            used = self._admit(budget)
            if used == 0:
                break
            budget -= used
        pool = self.manager.block_pool
        self.tally.active.append(1 - pool.get_num_free_blocks() / (pool.num_gpu_blocks - 1))

    def release(self, sequence: Sequence) -> None:
        """Give the blocks of a handed-over sequence back."""
        self.manager.free(sequence.request)
        self._forget(sequence.request.request_id)

    def _advance(self, sequence: Sequence, budget: int) -> int:
        request = sequence.request
        if 0 <= sequence.abort_at <= request.num_computed_tokens or self._done(sequence):
            self._finish(sequence)
            return 0
        tokens = min(request.num_tokens - request.num_computed_tokens, self._chunk_tokens, budget)
        if tokens > 1 or request.num_computed_tokens % BLOCK_TOKENS == 0:
            while self.manager.allocate_slots(request, tokens) is None:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    return 0
        self._computed(sequence, tokens)
        return tokens

    def _computed(self, sequence: Sequence, tokens: int) -> None:
        request = sequence.request
        request.num_computed_tokens += tokens
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(0)
            if request.num_output_tokens == 1 and self.on_prefilled is not None:
                sequence.block_ids = self._ids(sequence)
                self.running.remove(sequence)
                self.tally.finished.append(sequence.new_runs)
                self.on_prefilled(sequence)

    def _done(self, sequence: Sequence) -> bool:
        return sequence.request.num_output_tokens >= sequence.request.max_tokens

    def _ids(self, sequence: Sequence) -> list[int]:
        ids: list[int] = self.manager.get_block_ids(sequence.request.request_id)[0]
        return ids

    def _admit(self, budget: int) -> int:
        """Admit the head of the queue; returns the tokens it costs this step, 0 if it does not fit."""
        sequence, sender_runs = self.waiting[0]
        request = sequence.request
        hits, hit_tokens, *_ = self.manager.get_computed_blocks(request)
        loaded = request.num_prompt_tokens - hit_tokens if sender_runs else 0
        tokens = 0 if sender_runs else min(request.num_tokens - hit_tokens, self._chunk_tokens, budget)
        blocks = self.manager.allocate_slots(
            request,
            tokens,
            num_new_computed_tokens=hit_tokens,
            new_computed_blocks=hits,
            num_external_computed_tokens=loaded,
            delay_cache_blocks=bool(sender_runs),
            full_sequence_must_fit=True,
        )
        if blocks is None:
            self._check_refusal(request, hits.blocks[0], hit_tokens)
            return 0
        self.waiting.popleft()
        self.running.append(sequence)
        self._record_hits(sequence, hit_tokens)
        request.num_computed_tokens = hit_tokens + loaded
        self._computed(sequence, tokens)
        if sender_runs:
            sequence.block_ids = self._ids(sequence)
            self._loaded(sequence, sender_runs)
        return tokens or 1

    def _record_hits(self, sequence: Sequence, hit_tokens: int) -> None:
        sequence.hit_blocks = hit_tokens // BLOCK_TOKENS
        if not sequence.preempted:
            self.tally.prompt_tokens += sequence.request.num_prompt_tokens
            self.tally.hit_tokens += hit_tokens

    def _loaded(self, sequence: Sequence, sender_runs: list[Run]) -> None:
        count = sequence.prompt_blocks - sequence.hit_blocks
        self.on_load(sequence, slice_runs(sender_runs, sequence.hit_blocks, count))
        self.manager.cache_blocks(sequence.request, sequence.request.num_prompt_tokens)

    def _check_refusal(self, request: Request, hits: list[KVCacheBlock], hit_tokens: int) -> None:
        """A refusal is right only if the blocks that nobody references are too few."""
        blocks = self.manager.block_pool.blocks
        free = sum(1 for block in blocks if block.ref_cnt == 0 and not block.is_null)
        evictable = sum(1 for block in hits if block.ref_cnt == 0)
        needed = -(-request.num_tokens // BLOCK_TOKENS) - len(hits) + evictable
        self.tally.wrongly_refused += needed <= free

    def _finish(self, sequence: Sequence) -> None:
        sequence.block_ids = self._ids(sequence)
        self.tally.finished.append(sequence.new_runs)
        self.running.remove(sequence)
        self.release(sequence)

    def _preempt(self, victim: Sequence) -> None:
        self.manager.free(victim.request)
        victim.request.num_computed_tokens = 0
        victim.preempted = True
        self.running.remove(victim)
        self.waiting.appendleft((victim, []))
        self.tally.preemptions += 1


def sequences(rows: Iterator[TraceRequest], seed: int, *, abort_share: float = 0.03) -> Iterator[Sequence]:
    """Engine sequences of trace rows; a seeded ``abort_share`` of them is aborted somewhere on the way."""
    rng = random.Random(seed)
    for number, row in enumerate(rows):
        request = make_request(f"r{number}", row)
        abort_at = -1
        if rng.random() < abort_share:
            abort_at = rng.randrange(request.num_prompt_tokens + request.max_tokens)
        yield Sequence(request, abort_at, row)
