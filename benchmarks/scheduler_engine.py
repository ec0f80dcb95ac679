"""vLLM's real scheduler, KV cache manager and prefix cache under steady load, without a model.

Made up are token ids, block hashes and what a model samples: one token for each request whose prompt is done.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import count, islice
from typing import Any, NamedTuple

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from penstock.simulation.unloaded_model import unloaded_model

BLOCK_TOKENS = 16
LONGEST = 2_048


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Steady load: whoever ends is followed by a new arrival, so that ``waiting`` wait at any time.

    Prompts have ``prompt_blocks``, of which a client's requests share the first ``shared_blocks``; outputs
    are of evenly distributed lengths in ``output_tokens``. Requests ask for the ``targets_ms``, pairs of
    times to the first and to each further token, in turn.

    ``aged`` says where the first requests lie in memory: scattered, as in an engine that has served for a
    while, where a request gets the memory of those that ended before it came; or side by side, as those do
    that a fresh process makes one after the other. Stock's loops over what runs are faster on the latter.
    """

    running: int = 256
    waiting: int = 10_000
    clients: int = 100
    prompt_blocks: int = 64
    shared_blocks: int = 48
    output_tokens: tuple[int, int] = (64, 448)
    targets_ms: tuple[tuple[float, float], ...] = ()
    budget_tokens: int = 8_192
    pool_blocks: int = 32_768
    aged: bool = True
    seed: int = 0


class Stepped:
    """One scheduler of ``make``, filled to a :class:`Load`."""

    def __init__(self, load: Load, make: Callable[..., Any], section: dict[str, Any] | None) -> None:
        config = vllm_config(load)
        config.additional_config = {"penstock": {"scheduler": section}} if section is not None else {}
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float16)
        self.scheduler = make(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=load.pool_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            log_stats=True,
        )
        self._arrivals = arrivals(load)
        for _ in range(load.running + load.waiting):
            self.arrive(self.next_request())

    def arrive(self, request: Request) -> None:
        """A request arrives."""
        self.scheduler.add_request(request)

    def follow(self, leader: Sequence[str]) -> None:
        """Another scheduler admitted these requests in the step that this one makes next: nothing to do."""

    def next_request(self) -> Request:
        """The next request of the load."""
        return next(self._arrivals)

    def sampled(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """What a model would give back for a step."""
        requests = self.scheduler.requests
        ids = list(output.num_scheduled_tokens)
        tokens = [[7] if (r := requests[i]).num_computed_tokens >= r.num_tokens else [] for i in ids]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=tokens,
        )


class Follower(Stepped):
    """A scheduler that knows of each request only when another one admits it, and so serves the same requests
    in the same steps, wherever they lie in memory. All of them exist from their arrival on."""

    def __init__(self, load: Load, make: Callable[..., Any], section: dict[str, Any] | None) -> None:
        self._unserved: dict[str, Request] = {}
        super().__init__(load, make, section)

    def arrive(self, request: Request) -> None:
        self._unserved[request.request_id] = request

    def follow(self, leader: Sequence[str]) -> None:
        for name in leader:
            self.scheduler.add_request(self._unserved.pop(name))


class Drawn(NamedTuple):
    """One request of a load before it is made."""

    number: int
    client: int
    output_tokens: int


def arrivals(load: Load) -> Iterator[Request]:
    """The requests of a load, the same ones for everybody who asks."""
    drawn = _drawn(load)
    tokens = [0] * (load.prompt_blocks * BLOCK_TOKENS)
    if load.aged:
        first = list(enumerate(islice(drawn, load.running + load.waiting)))
        random.Random(load.seed).shuffle(first)
        made = {place: _request(load, tokens, one) for place, one in first}
        for place in range(len(first)):
            yield made.pop(place)
    for one in drawn:
        yield _request(load, tokens, one)


def _drawn(load: Load) -> Iterator[Drawn]:
    rng = random.Random(load.seed)
    for number in count():
        yield Drawn(number, rng.randrange(load.clients), rng.randint(*load.output_tokens))


def _request(load: Load, tokens: list[int], drawn: Drawn) -> Request:
    name = f"r{drawn.number}"
    params = SamplingParams(
        max_tokens=drawn.output_tokens,
        ignore_eos=True,
        extra_args={"client_id": f"c{drawn.client}", **_targets(load, drawn.number)},
    )
    hasher = _hasher(name, _document(drawn.client, load.shared_blocks))
    return Request(name, tokens, params, None, arrival_time=0.0, block_hasher=hasher)


def _targets(load: Load, number: int) -> dict[str, float]:
    if not load.targets_ms:
        return {}
    ttft_ms, tpot_ms = load.targets_ms[number % len(load.targets_ms)]
    return {"ttft_slo_ms": ttft_ms, "tpot_slo_ms": tpot_ms}


@cache
def _document(client: int, blocks: int) -> Sequence[BlockHash]:
    return tuple(BlockHash(f"{client} {block}".encode().ljust(32)) for block in range(blocks))


def _hasher(name: str, shared: Sequence[BlockHash]) -> Callable[[Request], list[BlockHash]]:
    def hash_blocks(request: Request) -> list[BlockHash]:
        first, last = len(request.block_hashes), request.num_tokens // BLOCK_TOKENS
        own = (
            BlockHash(f"{name} {block}".encode().ljust(32)) for block in range(max(first, len(shared)), last)
        )
        return [*shared[first:last], *own]

    return hash_blocks


def vllm_config(load: Load) -> VllmConfig:
    """The engine's configuration, checked and completed by vLLM, for a model that is never loaded."""
    with unloaded_model(LONGEST, "float16") as folder:
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            block_size=BLOCK_TOKENS,
            max_model_len=LONGEST,
            max_num_seqs=load.running,
            max_num_batched_tokens=load.budget_tokens,
            async_scheduling=False,
        ).create_engine_config()
    config.cache_config.num_gpu_blocks = load.pool_blocks
    return config
