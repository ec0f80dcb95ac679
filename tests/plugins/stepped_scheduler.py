"""vLLM's real schedulers and KV cache manager, stepped without an engine.

Real are the scheduler, its settings, requests, block pool and prefix cache; the model is a stub that answers
each scheduled request with tokens that depend on the request and its length alone.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from penstock.benchmarks.tiny_model import ensure_model

BLOCK = 16
init_none_hash(sha256)
HASHER = get_request_block_hasher(BLOCK, sha256)


@cache
def base_config(**settings: Any) -> VllmConfig:
    return EngineArgs(
        model=str(ensure_model()),
        dtype="bfloat16",
        block_size=BLOCK,
        max_model_len=1024,
        **settings,
    ).create_engine_config()


def request(name: str, prompt: list[int], output: int = 4, **extra_args: Any) -> Request:
    params = SamplingParams(max_tokens=output, ignore_eos=True, extra_args=extra_args or None)
    return Request(name, prompt, params, None, arrival_time=0.0, block_hasher=HASHER)


@dataclass
class Settings:
    blocks: int = 128
    budget: int = 64
    seqs: int = 8
    caching: bool = True
    is_async: bool = False
    long_prefill: int = 0
    ours: dict[str, Any] = field(default_factory=dict)

    def config(self, **more: Any) -> VllmConfig:
        import copy

        config = copy.deepcopy(base_config(**more))
        config.scheduler_config.max_num_batched_tokens = self.budget
        config.scheduler_config.max_num_seqs = self.seqs
        config.scheduler_config.async_scheduling = self.is_async
        config.scheduler_config.long_prefill_token_threshold = self.long_prefill
        config.cache_config.enable_prefix_caching = self.caching
        config.cache_config.num_gpu_blocks = self.blocks
        config.additional_config = {"penstock": {"scheduler": self.ours}}
        return config


def cache_config(blocks: int) -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float16)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def build(settings: Settings, make: Any = None, **arguments: Any) -> Any:
    """A scheduler of ``make``, or vLLM's own."""
    config = arguments.pop("vllm_config", None) or settings.config()
    make = make or (AsyncScheduler if settings.is_async else Scheduler)
    manager = StructuredOutputManager(config)
    # Tests' grammars are nobody's that could fill one in, and no model samples by it.
    manager.grammar_bitmask = lambda *args: None
    return make(
        vllm_config=config,
        kv_cache_config=cache_config(settings.blocks),
        structured_output_manager=manager,
        block_size=BLOCK,
        log_stats=True,
        **arguments,
    )


def token(request_id: str, position: int) -> int:
    return 10 + zlib.crc32(f"{request_id} {position}".encode()) % 1000


class Stepper:
    """Runs a scheduler; keeps up to ``depth`` steps in flight, as an engine with overlap does.

    While a step is in flight it asks for the grammar's bitmask, as an engine does, unless not ``asks``: an
    engine with overlap asks later where a grammar waits for tokens, and never for a step without tokens.
    """

    def __init__(self, scheduler: Any, depth: int = 1, *, asks: Callable[[], bool] = lambda: True) -> None:
        self.scheduler = scheduler
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.depth = depth
        self.asks = asks
        self.steps: list[tuple[Any, ...]] = []

    def step(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        self.steps.append(shape_of(output))
        self.in_flight.append((output, self._run(output)))
        if (self.depth == 1 or output.total_num_scheduled_tokens) and self.asks():
            self.scheduler.get_grammar_bitmask(output)
        while len(self.in_flight) >= self.depth:
            self.receive()
        return output

    def receive(self) -> None:
        self.scheduler.update_from_output(*self.in_flight.popleft())

    def _run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for name in ids:
            live = self.scheduler.requests[name]
            position = live.num_computed_tokens
            produces = position >= live.num_tokens
            sampled.append([token(name, position)] if produces else [])
        index = {name: i for i, name in enumerate(ids)}
        return ModelRunnerOutput(req_ids=ids, req_id_to_index=index, sampled_token_ids=sampled)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def drain(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests() and not self.in_flight:
                return
            if self.scheduler.has_unfinished_requests():
                self.step()
            else:
                self.receive()
        raise AssertionError("requests are left")


def shape_of(output: SchedulerOutput) -> tuple[Any, ...]:
    """All that a step orders of a worker, as comparable values."""
    cached = output.scheduled_cached_reqs
    return (
        [
            (new.req_id, new.prompt_token_ids, new.block_ids, new.num_computed_tokens)
            for new in output.scheduled_new_reqs
        ],
        (cached.req_ids, sorted(cached.resumed_req_ids), cached.new_token_ids, cached.new_block_ids),
        (cached.num_computed_tokens, cached.num_output_tokens),
        list(output.num_scheduled_tokens.items()),
        output.scheduled_spec_decode_tokens,
        sorted(output.preempted_req_ids or ()),
        sorted(output.finished_req_ids),
        output.num_common_prefix_blocks if hasattr(output, "num_common_prefix_blocks") else None,
    )
