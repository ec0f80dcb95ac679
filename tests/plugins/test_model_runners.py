"""Both model runners' ways of calling a KV connector: a prompt crosses from one engine's cache to another's.

Real are vLLM's runner-side interfaces (the mixin of V1 and ``ActiveKVConnector`` of V2), its settings, its
requests and block pools, the control channel; there is no model, so the prompt's bytes are made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from penstock.benchmarks.tiny_model import ensure_model
from penstock.plugins.vllm import transfer_worker
from penstock.plugins.vllm.connector import FlowKVConnector

Runner = Literal["V1", "V2"]

BLOCK_TOKENS = 16
NUM_BLOCKS = 64
LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
PROMPT = tuple(range(100, 200))
PATIENCE_S = 20.0

init_none_hash(sha256)


def cache_config() -> KVCacheConfig:
    """A block-outermost cache of two layers."""
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    page = spec.page_size_bytes
    stride = page * len(LAYERS)
    tensor = KVCacheTensor(NUM_BLOCKS * stride, list(LAYERS), layer_stride=page, block_stride=stride)
    return KVCacheConfig(
        NUM_BLOCKS, [tensor], [KVCacheGroupSpec(list(LAYERS), spec)], kv_cache_layout="BLHNC"
    )


class Engine:
    """The two halves of the connector in one engine, and the runner's interface between them."""

    def __init__(self, role: str, runner: Runner, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        transfer = KVTransferConfig(kv_connector="flowkv", kv_role=role)
        self._config: VllmConfig = EngineArgs(
            model=str(ensure_model()),
            dtype="bfloat16",
            block_size=BLOCK_TOKENS,
            kv_transfer_config=transfer,
            additional_config={"penstock": {"flowkv": {"transport": "loopback"}}},
        ).create_engine_config()
        config = cache_config()
        self.memory = torch.zeros(config.kv_cache_tensors[0].size, dtype=torch.uint8)
        pages = self.memory.view(NUM_BLOCKS, len(LAYERS), -1)
        caches = {layer: pages[:, index] for index, layer in enumerate(LAYERS)}
        self.manager = KVCacheManager(
            config, max_model_len=4096, scheduler_block_size=BLOCK_TOKENS, hash_block_size=BLOCK_TOKENS
        )
        self.scheduler = FlowKVConnector(self._config, KVConnectorRole.SCHEDULER, config)
        self.worker = FlowKVConnector(self._config, KVConnectorRole.WORKER, config)
        self.scheduler.bind_kv_cache_manager(self.manager)
        self._v2: ActiveKVConnector | None = None
        self._become_current()
        if runner == "V2":
            self._v2 = ActiveKVConnector(self._config, caches)
        else:
            self.worker.register_kv_caches(caches)
        handshake = self.worker.get_handshake_metadata()
        assert handshake is not None
        self.scheduler.set_xfer_handshake_metadata({0: handshake})

    def step(self) -> KVConnectorOutput:
        """One step without a forward pass, as the runner does it."""
        output = SchedulerOutput.make_empty()
        output.kv_connector_metadata = self.scheduler.build_connector_meta(output)
        self._become_current()
        if self._v2 is not None:
            result = self._v2.no_forward(output)
        else:
            result = KVConnectorModelRunnerMixin.kv_connector_no_forward(output, self._config)
        found = result.kv_connector_output or KVConnectorOutput()
        self.scheduler.update_connector_output(found)
        return found

    def steps_until(self, holds: Callable[[KVConnectorOutput], bool]) -> KVConnectorOutput:
        deadline = time.monotonic() + PATIENCE_S
        while not holds(output := self.step()):
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.002)
        return output

    def block_bytes(self, request: Request) -> torch.Tensor:
        ids = self.manager.get_block_ids(request.request_id)[0]
        return self.memory.view(NUM_BLOCKS, -1)[list(ids)]

    def close(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()

    def _become_current(self) -> None:
        self._patch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", self.worker)


def request_for(name: str, params: dict[str, Any]) -> Request:
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
    hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
    return Request(name, list(PROMPT), sampling, None, arrival_time=0.0, block_hasher=hasher)


@pytest.fixture
def engines(monkeypatch) -> Iterator[Callable[[str, Runner], Engine]]:
    monkeypatch.setattr(transfer_worker, "get_tensor_model_parallel_rank", lambda: 0)
    made: list[Engine] = []

    def make(role: str, runner: Runner) -> Engine:
        made.append(Engine(role, runner, monkeypatch))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def prefilled(engine: Engine) -> tuple[Request, dict[str, Any]]:
    """A prompt whose bytes are in ``engine``'s cache, and its hand-off."""
    request = request_for("p", {"do_remote_decode": True})
    engine.scheduler.on_new_request(request)
    assert engine.manager.allocate_slots(request, len(PROMPT)) is not None
    blocks = engine.block_bytes(request)
    filled = torch.randint(0, 256, blocks.shape, dtype=torch.uint8, generator=torch.manual_seed(0))
    ids = list(engine.manager.get_block_ids("p")[0])
    engine.memory.view(NUM_BLOCKS, -1)[ids] = filled
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens["p"] = len(PROMPT)
    step = engine.scheduler.build_connector_meta(output)
    assert set(step.to_digest) == {"p"}
    engine.worker.bind_connector_metadata(step)
    engine.worker.wait_for_save()
    engine.worker.clear_connector_metadata()
    request.num_computed_tokens = len(PROMPT)
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    _, params = engine.scheduler.request_finished(request, ids)
    assert params is not None
    engine.steps_until(lambda found: found.kv_connector_worker_meta is not None)
    return request, params


@pytest.mark.parametrize("decode", ["V1", "V2"])
@pytest.mark.parametrize("prefill", ["V1", "V2"])
def test_a_prompt_crosses_whole_and_both_sides_learn_of_it(engines, prefill, decode):
    sender, receiver = engines("kv_producer", prefill), engines("kv_consumer", decode)
    source, params = prefilled(sender)
    request = request_for("d", params)
    receiver.scheduler.on_new_request(request)
    matched, later = receiver.scheduler.get_num_new_matched_tokens(request, 0)
    assert (matched, later) == (len(PROMPT), True)
    allocated = receiver.manager.allocate_slots(
        request, 0, num_external_computed_tokens=matched, delay_cache_blocks=True
    )
    assert allocated is not None
    blocks = receiver.manager.get_blocks("d")
    receiver.scheduler.update_state_after_alloc(request, blocks, matched)
    done = receiver.steps_until(lambda found: bool(found.finished_recving))
    assert done.finished_recving == {"d"}
    assert not done.invalid_block_ids
    assert torch.equal(receiver.block_bytes(request), sender.block_bytes(source))
    sent = sender.steps_until(lambda found: bool(found.finished_sending))
    assert sent.finished_sending == {"p"}


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_load_that_cannot_start_names_its_blocks(engines, runner):
    sender, receiver = engines("kv_producer", runner), engines("kv_consumer", runner)
    _, params = prefilled(sender)
    request = request_for("d", {**params, "remote_prompt": "0" * 32})
    receiver.scheduler.on_new_request(request)
    matched, _ = receiver.scheduler.get_num_new_matched_tokens(request, 0)
    assert (
        receiver.manager.allocate_slots(
            request, 0, num_external_computed_tokens=matched, delay_cache_blocks=True
        )
        is not None
    )
    receiver.scheduler.update_state_after_alloc(request, receiver.manager.get_blocks("d"), matched)
    found = receiver.steps_until(lambda output: bool(output.finished_recving))
    assert found.finished_recving == {"d"}
    assert found.invalid_block_ids == set(receiver.manager.get_block_ids("d")[0])
