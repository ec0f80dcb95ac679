"""vLLM's own scheduler, KV cache manager and requests, stepped without a model.

Real are ``Scheduler`` (or any class or factory in its place), ``KVCacheManager``, its block pool and prefix
cache, ``Request`` and the block hashes. Made up are the runner's output and the token ids: token ``i`` of a
piece is the piece's key, so that equal prompts are equal lists of tokens. Drafts are made up, too: whether
one foresees output token ``i`` of a request depends on these two alone, so that every way to choose draft
lengths meets the same luck.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, hash_block_tokens, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from penstock.simulation.records import Ask, Batch, Piece, Progress, Prompt, Row
from penstock.simulation.unloaded_model import STOP, unloaded_model

DRAFTERS = ("ngram", "draft_model")

SchedulerFactory = Callable[..., Any]
"""A scheduler class, or a function, called with the keyword arguments of vLLM's engine core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """The settings of the engine, as ``vllm serve`` has them, and the size of its KV cache in tokens."""

    kv_tokens: int
    max_model_len: int = 32768
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    block_size: int = 16
    prefix_caching: bool = True
    policy: str = "fcfs"
    async_scheduling: bool = False
    """For a simulation with ``overlap``."""
    additional_config: Mapping[str, Any] = field(default_factory=dict)
    draft_tokens: int = 0
    drafter: str = "ngram"
    """How drafts are made: "draft_model" takes a pass for each token of the longest one, "ngram" none."""
    draft_schedule: tuple[tuple[int, int, int], ...] = ()
    """vLLM's schedule by batch size: first and last number of requests, draft tokens; none drafts
    ``draft_tokens`` always."""

    def __post_init__(self) -> None:
        if self.draft_tokens and self.async_scheduling:
            raise ValueError("async_scheduling: given beside draft_tokens, allowed: one of both")
        if self.drafter not in DRAFTERS:
            raise ValueError(f"drafter: given {self.drafter!r}, allowed: {', '.join(DRAFTERS)}")

    def speculation(self, model: str) -> dict[str, Any] | None:
        """``--speculative-config``; ``model`` is the folder of the draft model, if there is one."""
        if not self.draft_tokens:
            return None
        schedule = [list(entry) for entry in self.draft_schedule] or None
        own = {"prompt_lookup_max": 2} if self.drafter == "ngram" else {"model": model}
        return {
            "method": self.drafter,
            "num_speculative_tokens": self.draft_tokens,
            "num_speculative_tokens_per_batch_size": schedule,
            **own,
        }

    def passes(self, depth: int) -> int:
        """Passes of the drafter in a step that asks for drafts of ``depth`` tokens. A draft model makes its
        first one in any case: its own KV cache follows the model's."""
        return max(1, depth) if self.draft_tokens and self.drafter == "draft_model" else 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, with the one that vLLM keeps as the null block."""
        return -(-self.kv_tokens // self.block_size) + 1


def vllm_config(shape: EngineShape) -> VllmConfig:
    """The engine's configuration, checked and completed by vLLM itself, for a model that does not exist."""
    with unloaded_model(shape.max_model_len, "float16") as folder:
        made = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            max_model_len=shape.max_model_len,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            max_num_seqs=shape.max_num_seqs,
            block_size=shape.block_size,
            enable_prefix_caching=shape.prefix_caching,
            scheduling_policy=shape.policy,
            async_scheduling=shape.async_scheduling,
            disable_hybrid_kv_cache_manager=True,
            additional_config=dict(shape.additional_config),
            speculative_config=shape.speculation(folder),
        ).create_engine_config()
    made.cache_config.num_gpu_blocks = shape.num_blocks
    # vLLM's CPU platform turns it off, whatever it is told.
    made.scheduler_config.async_scheduling = shape.async_scheduling
    return made


def resolve(path: str) -> SchedulerFactory:
    """The class or function that ``--scheduler-cls`` names, ``package.module.Name``.

    Raises:
        ImportError: the module or the name in it does not exist.
    """
    module, _, name = path.rpartition(".")
    try:
        found: SchedulerFactory = getattr(import_module(module), name)
    except AttributeError as error:
        raise ImportError(f"{module} has no {name}") from error
    return found


@dataclass(slots=True)
class _Known:
    """What the pieces up to here give: blocks that end in the last piece, and tokens that fill none yet."""

    hashes: list[Any]
    last: Any
    rest: list[int]
    then: dict[Piece, _Known] = field(default_factory=dict)


class BlockHashes:
    """Block hashes of prompts as vLLM's hasher makes them, each distinct prefix hashed once."""

    def __init__(self, block_size: int, hash_function: Callable[[Any], bytes]) -> None:
        self._block_size = block_size
        self._hash = partial(hash_block_tokens, hash_function)
        self._later = get_request_block_hasher(block_size, hash_function)
        self._root = _Known([], None, [])

    def hasher(self, prompt: Prompt) -> Callable[[Request], list[Any]]:
        """A block hasher for a request with that prompt."""

        def hash_blocks(request: Request) -> list[Any]:
            if request.block_hashes or request.num_output_tokens:
                return list(self._later(request))
            return self.of(prompt)

        return hash_blocks

    def of(self, prompt: Prompt) -> list[Any]:
        """Hashes of all full blocks of ``prompt``; what its last piece adds is not remembered."""
        hashes: list[Any] = []
        node = self._root
        for piece in prompt[:-1]:
            following = node.then.get(piece)
            if following is None:
                following = node.then[piece] = self._after(node, piece)
            node = following
            hashes += node.hashes
        return hashes + self._after(node, prompt[-1]).hashes

    def _after(self, node: _Known, piece: Piece) -> _Known:
        size, last = self._block_size, node.last
        tokens = node.rest + [piece.key] * piece.tokens
        full = len(tokens) // size * size
        hashes = []
        for begin in range(0, full, size):
            last = self._hash(last, tokens[begin : begin + size], None)
            hashes.append(last)
        return _Known(hashes, last, tokens[full:])


class VllmEngine:
    """``SteppedEngine`` over a real vLLM scheduler.

    ``make`` is called as vLLM's engine core calls a scheduler class; None is vLLM's own.
    ``prepare(scheduler, clock)`` runs before the first request: the place to give a scheduler that reads time
    the virtual clock.
    """

    def __init__(
        self,
        shape: EngineShape,
        make: SchedulerFactory | None = None,
        *,
        clock: Callable[[], float] = lambda: 0.0,
        prepare: Callable[[Any, Callable[[], float]], None] | None = None,
    ) -> None:
        config = vllm_config(shape)
        spec = FullAttentionSpec(
            block_size=shape.block_size, num_kv_heads=1, head_size=64, dtype=torch.float16
        )
        kv_cache = KVCacheConfig(
            num_blocks=shape.num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        if make is None:
            make = AsyncScheduler if shape.async_scheduling else Scheduler
        self.scheduler = make(
            vllm_config=config,
            kv_cache_config=kv_cache,
            structured_output_manager=StructuredOutputManager(config),
            include_finished_set=False,
            log_stats=False,
            block_size=shape.block_size,
            hash_block_size=shape.block_size,
        )
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hashes = BlockHashes(shape.block_size, hash_function) if shape.prefix_caching else None
        self._shape = shape
        self._requests: dict[str, Request] = {}
        self._asks: dict[str, Ask] = {}
        if prepare is not None:
            prepare(self.scheduler, clock)

    def add(self, ask: Ask) -> None:
        """Queue a request.

        Raises:
            ValueError: prompt and output are longer than the model's context or the whole KV cache, or the
                answer ends by a stop token and steps are scheduled before its tokens are known.
        """
        if ask.most_output_tokens is not None and self._shape.async_scheduling:
            raise ValueError(
                f"request {ask.request_id!r}: most_output_tokens given beside async_scheduling, allowed: one"
            )
        room = min(self._shape.max_model_len, (self._shape.num_blocks - 1) * self._shape.block_size)
        if ask.prompt_tokens + ask.allowed_tokens > room:
            raise ValueError(
                f"request {ask.request_id!r} has {ask.prompt_tokens} + {ask.allowed_tokens} tokens, "
                f"allowed: {room}"
            )
        tokens: list[int] = []
        for piece in ask.prompt:
            tokens += [piece.key] * piece.tokens
        request = Request(
            ask.request_id,
            tokens,
            SamplingParams(
                max_tokens=ask.allowed_tokens,
                ignore_eos=True,
                stop_token_ids=[] if ask.most_output_tokens is None else [STOP],
                extra_args=extra_args(ask),
            ),
            None,
            arrival_time=ask.arrival_s,
            priority=ask.priority,
            block_hasher=None if self._hashes is None else self._hashes.hasher(ask.prompt),
        )
        self._requests[ask.request_id] = request
        self._asks[ask.request_id] = ask
        self.scheduler.add_request(request)

    def schedule(self) -> Batch:
        """One call of the scheduler."""
        output = self.scheduler.schedule()
        requests = self._requests
        rows = [
            Row(request_id, requests[request_id].num_computed_tokens - tokens, tokens)
            for request_id, tokens in output.num_scheduled_tokens.items()
        ]
        token = (output, self._sampled(output))
        if rows or not self._shape.async_scheduling:
            # As vLLM's engine core does while the device computes the step; no request has a grammar.
            self.scheduler.get_grammar_bitmask(output)
        passes = self._shape.passes(output.num_spec_tokens_to_schedule) if rows else 0
        return Batch(rows, tuple(sorted(output.preempted_req_ids or ())), token, passes)

    def _sampled(self, output: Any) -> ModelRunnerOutput:
        """One token for every request whose tokens are all computed, as it stands when a step is chosen, and
        the drafts before it that foresaw theirs."""
        ids, drafts = list(output.num_scheduled_tokens), output.scheduled_spec_decode_tokens
        sampled = []
        for request_id in ids:
            request = self._requests[request_id]
            complete = request.num_computed_tokens >= request.num_tokens
            foreseen = self._foreseen(request, len(drafts.get(request_id, ())))
            sampled.append(self._next_tokens(request, 1 + foreseen) if complete else [])
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
        )

    def _next_tokens(self, request: Request, number: int) -> list[int]:
        ask = self._asks[request.request_id]
        left = ask.output_tokens - request.num_output_tokens
        if ask.most_output_tokens is None or number < left:
            return [ask.answer] * number
        return [*[ask.answer] * (left - 1), STOP]

    def complete(self, batch: Batch) -> list[Progress]:
        """Give the scheduler what the step's requests sampled."""
        output, made = cast(tuple[Any, ModelRunnerOutput], batch.token)
        progress = []
        for outputs in self.scheduler.update_from_output(output, made).values():
            for one in outputs.outputs:
                finished = one.finish_reason is not None
                progress.append(Progress(one.request_id, len(one.new_token_ids), finished))
                if finished:
                    del self._requests[one.request_id], self._asks[one.request_id]
        if self._shape.draft_tokens:
            self._draft(output)
        return progress

    def _foreseen(self, request: Request, drafted: int) -> int:
        """Of the next ``drafted`` tokens of a request, those up to the first that no draft foresees."""
        ask, first = self._asks[request.request_id], request.num_output_tokens
        places = range(first, first + drafted)
        return next(
            (place - first for place in places if luck(request.request_id, place) >= ask.predictable), drafted
        )

    def _draft(self, output: Any) -> None:
        """Drafts for the step after ``output``, as workers make them."""
        live = [name for name in output.num_scheduled_tokens if name in self._requests]
        tokens = output.num_spec_tokens_to_schedule
        self.scheduler.update_draft_token_ids(
            DraftTokenIds(live, [[self._asks[name].answer] * tokens for name in live])
        )

    def describe(self) -> str:
        """What waits, what runs, and how many blocks are free."""
        scheduler = self.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        oldest = next(iter(self._requests.values()), None)
        head = "" if oldest is None else f", the oldest {oldest.request_id!r} of {oldest.num_tokens} tokens"
        return (
            f"{len(self._requests) - len(scheduler.running)} wait{head}; {len(scheduler.running)} run; "
            f"{pool.get_num_free_blocks()} of {pool.num_gpu_blocks} blocks are free"
        )


def luck(request_id: str, place: int) -> float:
    """Evenly spread over 0 to 1, by request and place of an output token."""
    return zlib.crc32(f"{place} {request_id}".encode()) / 2**32


def extra_args(ask: Ask) -> dict[str, Any]:
    """What a client says about itself and its targets, under the keys of a request's ``vllm_xargs``."""
    given = {
        "client_id": ask.client or None,
        "weight": ask.weight if ask.weight != 1.0 else None,
        "ttft_slo_ms": ask.ttft_slo_ms,
        "tpot_slo_ms": ask.tpot_slo_ms,
    }
    return {key: value for key, value in given.items() if value is not None}
