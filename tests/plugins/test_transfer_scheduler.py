"""The scheduler halves of a prefill and a decode engine, with vLLM's own requests, blocks and settings.

No model and no worker: what counts is what a step orders from the workers, and what becomes of leases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig, ParallelConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from penstock.benchmarks.pool_engine import BLOCK_TOKENS, make_manager
from penstock.connectors.config import FlowKVConfig
from penstock.connectors.control import ControlClient
from penstock.connectors.handoff import Address
from penstock.plugins.vllm.transfer_meta import StepMetadata, WorkerMetadata
from penstock.plugins.vllm.transfer_scheduler import TransferScheduler

init_none_hash(sha256)
HASHER = get_request_block_hasher(BLOCK_TOKENS, sha256)
POOL = 64
PROMPT = tuple(range(100, 140))
BLOCKS = 3
PATIENCE_S = 20.0


def request_for(name: str, prompt: tuple[int, ...], params: dict[str, Any] | None, **more: Any) -> Request:
    """A request that asks for one token beyond ``prompt``."""
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
    return Request(name, list(prompt), sampling, None, arrival_time=0.0, block_hasher=HASHER, **more)


@dataclass
class Half:
    """One engine's scheduler half and the pool behind it."""

    role: str
    config: FlowKVConfig
    policy: str = "fail"
    manager: KVCacheManager = field(default_factory=lambda: make_manager(POOL))

    def __post_init__(self) -> None:
        transfer = KVTransferConfig(
            kv_connector="flowkv", kv_role=self.role, kv_load_failure_policy=self.policy
        )
        settings: Any = SimpleNamespace(kv_transfer_config=transfer, parallel_config=ParallelConfig())
        self.scheduler = TransferScheduler(settings, self.manager.kv_cache_config, self.config, self.role)
        self.scheduler.bind_kv_cache_manager(self.manager)

    def step(self) -> StepMetadata:
        return self.scheduler.build_connector_meta(SchedulerOutput.make_empty())

    def prefill(self, name: str, prompt: tuple[int, ...]) -> dict[str, Any]:
        """Compute ``prompt`` and hand it off; returns what the client would carry to the decode server."""
        request = request_for(name, prompt, {"do_remote_decode": True})
        self.scheduler.on_new_request(request)
        assert self.manager.allocate_slots(request, len(prompt)) is not None
        request.num_computed_tokens = len(prompt)
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        keep, params = self.scheduler.request_finished(request, self.blocks_of(name))
        assert keep
        assert params is not None
        return params

    def receive(self, request: Request) -> StepMetadata:
        """Queue and admit ``request``; returns the step that carries its orders."""
        self.scheduler.on_new_request(request)
        matched, later = self.scheduler.get_num_new_matched_tokens(request, 0)
        allocated = self.manager.allocate_slots(
            request,
            0 if later else request.num_prompt_tokens,
            num_external_computed_tokens=matched or 0,
            delay_cache_blocks=later,
        )
        assert allocated is not None
        blocks = self.manager.get_blocks(request.request_id)
        self.scheduler.update_state_after_alloc(request, blocks, matched or 0)
        return self.step()

    def blocks_of(self, name: str) -> list[int]:
        return list(self.manager.get_block_ids(name)[0])

    def end(self, request: Request) -> None:
        """The request is over, as after an abort."""
        request.status = RequestStatus.FINISHED_ABORTED
        keep, params = self.scheduler.request_finished(request, self.blocks_of(request.request_id))
        assert (keep, params) == (False, None)
        self.manager.free(request)


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


@pytest.fixture
def halves() -> Iterator[Callable[..., Half]]:
    made: list[Half] = []

    def make(role: str, policy: str = "fail", **settings: Any) -> Half:
        made.append(Half(role, FlowKVConfig(digest="off", **settings), policy))
        if role == "kv_producer":
            made[-1].scheduler.set_xfer_handshake_metadata({})
        return made[-1]

    yield make
    for half in made:
        half.scheduler.shutdown()


def given_back(sender: Half, name: str) -> bool:
    return name in sender.step().finished_sending


def test_the_whole_prompt_is_ordered_from_the_sender_s_runs(halves):
    sender, receiver = halves("kv_producer"), halves("kv_consumer")
    params = sender.prefill("p", PROMPT)
    request = request_for("d", PROMPT, params)
    step = receiver.receive(request)
    [load] = step.loads
    assert (load.request_id, load.first, step.rejected) == ("d", 0, [])
    assert [tuple(run) for run in load.hand_off.runs] == params["remote_runs"]
    assert [b for run in load.targets for b in range(run.start, run.stop)] == receiver.blocks_of("d")
    assert len(receiver.blocks_of("d")) == BLOCKS
    assert not given_back(sender, "p"), "the blocks are promised until they are read"


@pytest.mark.parametrize(
    ("prompt", "more", "said"),
    [
        (PROMPT[:30], {}, "prompt length is 30 here and 40 at the prefill server"),
        ((*PROMPT[:-1], 7), {}, "prompt fingerprint"),
        (PROMPT, {"cache_salt": "tenant"}, "prompt fingerprint"),
    ],
    ids=["prefill truncated it", "another prompt", "another salt"],
)
@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_f14_a_hand_off_of_another_prompt_is_never_loaded(halves, prompt, more, said, policy, caplog):
    sender, receiver = halves("kv_producer"), halves("kv_consumer", policy)
    step = receiver.receive(request_for("d", prompt, sender.prefill("p", PROMPT), **more))
    assert step.loads == []
    if policy == "fail":
        [rejected] = step.rejected
        assert said in rejected.reason
        assert list(rejected.target_blocks) == receiver.blocks_of("d")
    else:
        assert step.rejected == []
        assert said in caplog.text
        assert receiver.scheduler.take_stats().failed_handshakes == 1


def test_hosts_that_are_not_allowed_are_never_asked(halves):
    sender, receiver = halves("kv_producer"), halves("kv_consumer", allowed_hosts=("10.0.0.1",))
    step = receiver.receive(request_for("d", PROMPT, sender.prefill("p", PROMPT)))
    assert step.loads == []
    assert "not among allowed_hosts" in step.rejected[0].reason


@pytest.mark.parametrize("stand_in", [False, True])
def test_a_name_that_is_not_allowed_is_never_looked_up(halves, stand_in, monkeypatch):
    asked: list[Address] = []
    monkeypatch.setattr(ControlClient, "ask", lambda _, address, question: asked.append(address))
    sender, receiver = halves("kv_producer"), halves("kv_consumer")
    params = {**sender.prefill("p", PROMPT), "remote_host": "slow.example.org"}
    request = request_for("d", PROMPT, params, abort_immediately=stand_in)
    if stand_in:
        receiver.scheduler.on_new_request(request)
    else:
        assert "is a name" in receiver.receive(request).rejected[0].reason
    receiver.end(request)
    receiver.scheduler.shutdown()
    assert asked == []


def test_an_allowed_name_is_asked(halves):
    sender, receiver = halves("kv_producer"), halves("kv_consumer", allowed_hosts=("prefill-0",))
    params = {**sender.prefill("p", PROMPT), "remote_host": "prefill-0"}
    assert receiver.receive(request_for("d", PROMPT, params)).rejected == []


def test_a_request_that_ends_before_its_load_gives_the_lease_back(halves):
    sender, receiver = halves("kv_producer"), halves("kv_consumer")
    request = request_for("d", PROMPT, sender.prefill("p", PROMPT))
    receiver.scheduler.on_new_request(request)
    receiver.end(request)
    eventually(lambda: given_back(sender, "p"))


def test_what_the_front_end_refuses_gives_the_lease_back(halves):
    sender, receiver = halves("kv_producer"), halves("kv_consumer")
    params = sender.prefill("p", PROMPT)
    stand_in = request_for("d", (0,), params, abort_immediately=True)
    receiver.scheduler.on_new_request(stand_in)
    receiver.end(stand_in)
    eventually(lambda: given_back(sender, "p"))


def test_a_failed_load_gives_the_lease_back(halves):
    sender, receiver = halves("kv_producer"), halves("kv_consumer")
    receiver.receive(request_for("d", PROMPT, sender.prefill("p", PROMPT)))
    receiver.scheduler.update_connector_output(
        KVConnectorOutput(
            finished_recving={"d"}, kv_connector_worker_meta=WorkerMetadata(failed={"d"}, digests={})
        )
    )
    eventually(lambda: given_back(sender, "p"))


def test_a_lease_that_nobody_reads_runs_out_and_is_counted(halves):
    sender = halves("kv_producer", pickup_s=0.02)
    sender.prefill("p", PROMPT)
    eventually(lambda: given_back(sender, "p"))
    assert sender.scheduler.take_stats().expired_leases == 1


def test_an_aborted_prefill_hands_nothing_off(halves):
    sender = halves("kv_producer")
    request = request_for("p", PROMPT, {"do_remote_decode": True})
    sender.scheduler.on_new_request(request)
    assert sender.manager.allocate_slots(request, BLOCK_TOKENS) is not None
    sender.end(request)


def test_a_hand_over_uses_blocks_in_a_row_at_both_ends(halves):
    sender, receiver = halves("kv_producer"), halves("kv_consumer")
    step = receiver.receive(request_for("d", PROMPT, sender.prefill("p", PROMPT)))
    assert len(step.loads[0].hand_off.runs) == len(step.loads[0].targets) == 1
