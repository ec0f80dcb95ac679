"""Stock SGLang on the reference platform computes what transformers does; Penstock is installed, and off."""

from __future__ import annotations

import random
from functools import partial

import pytest
from sglang_server import CHUNK, Serve, all_at_once, ask, generate

from penstock.benchmarks.processes import Server

TOKENS = 12
SHARED = 200
LENGTHS = (2, 31, SHARED, SHARED + 1, SHARED + 57, 3 * CHUNK + 5)


def prompts() -> list[list[int]]:
    """Prompts of several lengths that begin alike, the longest of several chunks."""
    draw = random.Random(5)
    shared = [draw.randrange(10, 600) for _ in range(SHARED)]
    rest = [[draw.randrange(10, 600) for _ in range(max(0, n - SHARED))] for n in LENGTHS]
    return [(shared + tail)[:n] for n, tail in zip(LENGTHS, rest, strict=True)]


@pytest.fixture(scope="module")
def server(serve: Serve):
    with serve(name="sglang-stock") as server:
        yield server


def test_the_server_runs_what_the_test_is_about(server: Server):
    info = ask(server, "/server_info")
    assert info["attention_backend"] == "torch_native"
    assert not info["disable_overlap_schedule"]
    assert not info["disable_radix_cache"]
    assert info["chunked_prefill_size"] == CHUNK
    assert info["schedule_policy"] == "fcfs"


def test_concurrent_requests_are_answered_as_by_transformers_cold_and_from_the_prefix_cache(server, greedy):
    wanted = [greedy(prompt, TOKENS) for prompt in prompts()]
    assert len({token for row in wanted for token in row}) > TOKENS, "the model does not repeat itself"
    cached = []
    for _wave in range(2):
        answers = all_at_once([partial(generate, server, prompt, TOKENS) for prompt in prompts()])
        assert [answer["output_ids"] for answer in answers] == wanted
        cached.append([answer["meta_info"]["cached_tokens"] for answer in answers])
    assert cached[1] == [length - 1 for length in LENGTHS], "the second wave comes from the prefix cache"
