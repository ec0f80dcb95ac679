"""The cached part of a waiting prompt, found by halving, is what vLLM finds by walking."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm")

from stepped_scheduler import BLOCK, Settings, Stepper, build, request

from penstock.plugins.vllm.cached_prefix import CachedPrefix


def walked(scheduler, sample):
    found = scheduler.kv_cache_manager.coordinator.find_longest_cache_hit(
        sample.block_hashes, sample.num_tokens - 1
    )
    return found[1]


def test_halving_finds_what_walking_finds_while_blocks_come_and_go():
    rng = random.Random(0)
    scheduler = build(Settings(blocks=90, budget=256))
    stepper = Stepper(scheduler)
    cached = CachedPrefix(scheduler)
    documents = [[rng.randrange(5000) for _ in range(400)] for _ in range(4)]
    found = []
    for number in range(120):
        prompt = rng.choice(documents)[: rng.randrange(1, 400)] + [number] * rng.randrange(20)
        sample = request(f"r{number}", prompt, rng.randrange(1, 30))
        found.append(cached.tokens_of(sample))
        assert found[-1] == walked(scheduler, sample)
        scheduler.add_request(sample)
        for _ in range(rng.randrange(4)):
            stepper.step()
    assert 0 in found
    assert len(set(found)) > 10


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1])
def test_the_last_token_is_never_cached(length):
    scheduler = build(Settings())
    stepper = Stepper(scheduler)
    prompt = [7] * length
    scheduler.add_request(request("first", prompt))
    stepper.drain()
    assert CachedPrefix(scheduler).tokens_of(request("again", prompt)) == (length - 1) // BLOCK * BLOCK


def test_models_that_do_not_attend_to_all_are_walked(monkeypatch):
    scheduler = build(Settings())
    scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec = object()
    coordinator = scheduler.kv_cache_manager.coordinator
    monkeypatch.setattr(coordinator, "find_longest_cache_hit", lambda hashes, most: ((), most // 2))
    assert CachedPrefix(scheduler).tokens_of(request("r", [7] * 81)) == 40


def test_without_a_cache_nothing_is_cached():
    scheduler = build(Settings(caching=False))
    assert CachedPrefix(scheduler).tokens_of(request("r", [7] * 80)) == 0
