"""The run allocator inside vLLM's real KV cache manager."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, FreeKVCacheBlockQueue
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from penstock.connectors.allocator import AllocatorConfig
from penstock.connectors.runs import Run, join_runs, runs_of
from penstock.plugins.vllm.run_pool import RunPool

BLOCK = 16


def attention(cls=FullAttentionSpec, **more):
    return cls(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float16, **more)


def make_manager(num_blocks, specs=None, caching=True):
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs or [attention()])]
    config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(
        config, max_model_len=8192, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_caching=caching
    )


def make_request(name, num_tokens, prefix=None):
    """A request whose block hashes follow ``prefix``: equal prefixes hit each other's blocks."""
    label = str(prefix or name).encode()

    def hasher(request):
        first, last = len(request.block_hashes), request.num_tokens // BLOCK
        return [BlockHash(label + i.to_bytes(4, "little")) for i in range(first, last)]

    return Request(name, [0] * num_tokens, SamplingParams(max_tokens=9), None, block_hasher=hasher)


def prefill(manager, request, chunk=64):
    """Chunked prefill; False if the pool refuses, with the request's blocks freed."""
    hits, computed, *_ = manager.get_computed_blocks(request)
    arguments = {"num_new_computed_tokens": computed, "new_computed_blocks": hits}
    request.num_computed_tokens = 0
    while computed < request.num_tokens:
        tokens = min(chunk, request.num_tokens - computed)
        if manager.allocate_slots(request, tokens, **arguments) is None:
            manager.free(request)
            return False
        arguments = {}
        computed += tokens
        request.num_computed_tokens = computed
    return True


def block_ids(manager, request):
    return manager.get_block_ids(request.request_id)[0]


class Traffic:
    """Seeded requests with shared prefixes, growth and aborts on one manager."""

    def __init__(self, manager, seed, pool=None):
        self.manager, self.pool, self.rng = manager, pool, random.Random(seed)
        self.live = []
        self.refused = 0

    def step(self, number):
        if self.rng.random() < 0.5:
            tokens = self.rng.randint(1, 60 * BLOCK)
            request = make_request(f"r{number}", tokens, prefix=self.rng.choice(("a", "b", None)))
            if self.pool and self.rng.random() < 0.7:
                self.pool.announce(request.request_id, -(-tokens // BLOCK))
            if prefill(self.manager, request):
                self.live.append(request)
            else:
                self.refused += 1
        elif self.live:
            request = self.rng.choice(self.live)
            request.append_output_token_ids([0] * 17)
            if self.manager.allocate_slots(request, 17) is not None:
                request.num_computed_tokens += 17
            if self.rng.random() < 0.6:
                self.live.remove(request)
                self.manager.free(request)
                if self.pool:
                    self.pool.forget(request.request_id)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_free_list_and_the_allocator_stay_the_same_set(seed, caching):
    manager = make_manager(400, caching=caching)
    pool = RunPool.install(manager)
    assert pool.reason is None
    traffic = Traffic(manager, seed, pool)
    for number in range(400):
        traffic.step(number)
        if number % 10 == 0:
            pool.check_integrity()
    used = [b for request in traffic.live for b in block_ids(manager, request)]
    referenced = sum(block.ref_cnt for block in manager.block_pool.blocks if not block.is_null)
    assert len(used) == referenced
    for request in traffic.live:
        manager.free(request)
    pool.check_integrity()
    assert manager.block_pool.get_num_free_blocks() == 399


def test_nothing_is_refused_that_the_stock_order_admits():
    """Without prefix hits both orders see the same counts, so they admit the same requests."""
    stock, runs = make_manager(300, caching=False), make_manager(300, caching=False)
    ours = Traffic(runs, 7, RunPool.install(runs))
    theirs = Traffic(stock, 7, None)
    theirs.pool = Silent()
    for number in range(600):
        ours.step(number)
        theirs.step(number)
        assert runs.block_pool.get_num_free_blocks() == stock.block_pool.get_num_free_blocks()
    assert ours.refused == theirs.refused > 0


class Silent:
    """Takes announcements and does nothing."""

    def announce(self, *_):
        pass

    forget = announce


def test_chunks_of_interleaved_requests_come_as_single_runs():
    manager = make_manager(1000)
    pool = RunPool.install(manager)
    requests = [make_request(f"r{i}", 800) for i in range(4)]
    for request in requests:
        pool.announce(request.request_id, 50)
    for _ in range(10):
        for request in requests:
            manager.allocate_slots(request, 80)
            request.num_computed_tokens += 80
    assert [len(runs_of(block_ids(manager, request))) for request in requests] == [1, 1, 1, 1]


def test_a_load_lines_up_with_the_sender_behind_the_local_hits():
    manager = make_manager(300)
    pool = RunPool.install(manager, config=AllocatorConfig(age_weight=0.0, split_price=0.1))
    first = make_request("first", 20 * BLOCK + 1, prefix="p")
    prefill(manager, first)
    manager.free(first)
    blockers = [make_request(f"b{i}", 41 * BLOCK, prefix=f"b{i}") for i in range(6)]
    for blocker in blockers:
        prefill(manager, blocker, chunk=41 * BLOCK)
    for blocker in blockers[::2]:
        manager.free(blocker)
    sender = [Run(5000, 30), Run(6000, 41), Run(7000, 29)]
    request = make_request("loaded", 100 * BLOCK, prefix="p")
    pool.announce("loaded", 100, sender)
    hits, computed, *_ = manager.get_computed_blocks(request)
    assert computed == 20 * BLOCK
    manager.allocate_slots(
        request,
        0,
        num_new_computed_tokens=computed,
        new_computed_blocks=hits,
        num_external_computed_tokens=100 * BLOCK - computed,
        delay_cache_blocks=True,
    )
    target = runs_of(block_ids(manager, request)[20:])
    assert len(join_runs([Run(5020, 10), Run(6000, 41), Run(7000, 29)], target)) == 3


def test_the_older_of_two_cached_prompts_is_evicted_and_from_its_tail():
    manager = make_manager(400)
    pool = RunPool.install(manager)
    for name in ("old", "new"):
        request = make_request(name, 150 * BLOCK + 1)
        pool.announce(name, 151)
        prefill(manager, request)
        manager.free(request)
    prefill(manager, make_request("fresh", 150 * BLOCK), chunk=150 * BLOCK)
    again = {name: make_request(name, 150 * BLOCK + 1) for name in ("old", "new")}
    hits = {name: manager.get_computed_blocks(request)[1] // BLOCK for name, request in again.items()}
    assert hits["new"] == 150
    assert 0 < hits["old"] < 150


def test_every_operation_of_the_queue_works():
    manager = make_manager(50)
    pool = RunPool.install(manager)
    queue = manager.block_pool.free_block_queue
    one = queue.popleft()
    several = queue.popleft_n(5)
    assert len({block.block_id for block in [one, *several]}) == 6
    assert queue.popleft_n(0) == []
    queue.append(one)
    queue.append_n(several[:2])
    queue.prepend_n(several[2:])
    assert queue.num_free_blocks == 49
    order = queue.get_all_free_blocks()
    assert order[:3] == several[2:]
    assert order[-3:] == [one, *several[:2]]
    queue.remove(order[10])
    assert queue.num_free_blocks == 48
    with pytest.raises(RuntimeError, match="invalid block"):
        queue.remove(order[10])
    pool.check_integrity()
    queue.popleft_n(48)
    with pytest.raises(ValueError, match="No free blocks"):
        queue.popleft()


def test_an_epoch_counts_each_time_that_a_block_is_handed_out():
    manager = make_manager(50)
    pool = RunPool.install(manager)
    expected = np.zeros(50, dtype=np.uint32)
    for number in range(30):
        request = make_request(f"r{number}", 20 * BLOCK, prefix="p")
        hits = manager.get_computed_blocks(request)[1] // BLOCK
        prefill(manager, request)
        expected[block_ids(manager, request)[hits:]] += 1
        manager.free(request)
    assert pool.epochs.dtype == np.uint32
    assert (pool.epochs == expected).all()


def test_a_preempted_request_keeps_what_was_announced():
    manager = make_manager(500)
    pool = RunPool.install(manager)
    request = make_request("r", 800)
    pool.announce("r", 50)
    manager.allocate_slots(request, 160)
    manager.free(request)
    pool.check_integrity()
    manager.allocate_slots(request, 160)
    other = make_request("other", 160)
    manager.allocate_slots(other, 160)
    request.num_computed_tokens = 160
    manager.allocate_slots(request, 640)
    assert len(runs_of(block_ids(manager, request))) == 1


def test_nothing_is_kept_for_requests_that_are_gone():
    manager = make_manager(500)
    pool = RunPool.install(manager)
    for number in range(20):
        request = make_request(f"r{number}", 100)
        if number % 2:
            pool.announce(request.request_id, 7)
        prefill(manager, request)
        manager.free(request)
        pool.forget(request.request_id)
    assert pool.num_known_requests == 0


def test_installing_twice_is_installing_once():
    manager = make_manager(50)
    assert RunPool.install(manager) is RunPool.install(manager)


def test_uninstalling_gives_the_stock_order_back():
    manager = make_manager(200)
    pool = RunPool.install(manager)
    request = make_request("r", 320)
    prefill(manager, request)
    manager.free(request)
    pool.uninstall()
    queue = manager.block_pool.free_block_queue
    assert not any(callable(value) for value in vars(queue).values())
    first = queue.get_all_free_blocks()[0]
    assert queue.popleft() is first
    assert pool.reason == "it was uninstalled"


def test_the_class_of_the_queue_is_left_alone():
    before = dict(vars(FreeKVCacheBlockQueue))
    RunPool.install(make_manager(50))
    assert dict(vars(FreeKVCacheBlockQueue)) == before


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        (
            [attention(), attention(SlidingWindowSpec, sliding_window=64)],
            "2 KV cache groups, one is supported",
        ),
        ([attention(SlidingWindowSpec, sliding_window=64)], "SlidingWindowManager, FullAttentionManager is"),
    ],
)
def test_managers_it_does_not_know_keep_their_order(specs, reason, caplog):
    manager = make_manager(100, specs)
    with caplog.at_level(logging.WARNING):
        pool = RunPool.install(manager)
    assert reason in pool.reason
    assert len(caplog.records) == 1
    pool.announce("r", 9)
    order = [block.block_id for block in manager.block_pool.free_block_queue.get_all_free_blocks()]
    assert [block.block_id for block in manager.block_pool.get_new_blocks(3)] == order[:3]
    assert list(np.flatnonzero(pool.epochs)) == order[:3]
    pool.forget("r")
    pool.check_integrity()


def test_a_queue_with_an_unknown_method_keeps_its_order(monkeypatch):
    monkeypatch.setattr(FreeKVCacheBlockQueue, "popright", lambda self: None, raising=False)
    pool = RunPool.install(make_manager(20))
    assert pool.reason == "FreeKVCacheBlockQueue has unknown methods: popright"
