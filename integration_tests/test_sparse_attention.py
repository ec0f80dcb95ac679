"""Sparse attention on a real server, by its flag, under chunked prefill, prefix caching and preemption."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.benchmarks.asks import Ask, ask_all, ask_together
from penstock.benchmarks.processes import Server
from penstock.benchmarks.scrape import samples
from penstock.benchmarks.servers import Engine, engine_server, serving
from penstock.benchmarks.tiny_model import corpus

MASS = 0.5
"""Random weights attend to everything alike, so that a larger share would be nearly all pages."""
LEAST_TOKENS = 1000
SECTION = {
    "penstock": {
        "sparse_attention": {
            "mass": MASS,
            "least_tokens": LEAST_TOKENS,
            "dense_layers": 1,
            "most_share": 0.95,
            "calibration_share": 0.2,
            "log_steps": 200,
        }
    }
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
PROGRESS = re.compile(
    r"penstock: sparse attention: read ([\d.]+) % of pages in (\d+) selections.*"
    r"mass P10 ([\d.]+), P50 ([\d.]+)"
)


@pytest.fixture(scope="module")
def sparse_server(engine: Engine, logs: Path) -> Iterator[Server]:
    """Prompts come in chunks, and the cache is too small for all requests at once."""
    variant = msgspec.structs.replace(
        engine,
        name="sparse",
        kv_blocks=300,
        arguments=(
            "--enforce-eager",
            "--sparse-attention=tactic",
            f"--additional-config={json.dumps(SECTION)}",
            "--max-num-batched-tokens=512",
        ),
    )
    server = engine_server(variant, logs)
    with serving([server]):
        yield server


def asks(count: int, characters: int, tokens: int, shared: int = 0) -> list[Ask]:
    """Prompts of ``characters``, the first ``shared`` of them alike."""
    text = corpus() * 10
    return [
        Ask(
            name=f"{characters} {number}",
            prompt=text[:shared] + f"{number}: " + text[97 * number :][: characters - shared],
            max_tokens=tokens,
        )
        for number in range(count)
    ]


def test_below_the_activation_length_tokens_are_a_plain_servers(
    sparse_server: Server, plain_server: Server, model: str
) -> None:
    short = asks(6, 1500, 32)
    ours, plain = (ask_all(server.url, model, short) for server in (sparse_server, plain_server))
    assert max(answer.prompt_tokens + 32 for answer in ours) < LEAST_TOKENS
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in plain]


def test_above_it_answers_come_and_the_mass_is_measured(sparse_server: Server, model: str) -> None:
    long = asks(8, 9000, 160, shared=4000)
    for _ in range(2):
        answers = ask_together(sparse_server.url, model, long, at_once=8)
        assert [len(answer.token_ids) for answer in answers] == [160] * 8
        assert min(answer.prompt_tokens for answer in answers) > LEAST_TOKENS
    found = samples(sparse_server.url)
    assert found["vllm:num_preemptions_total"] > 0
    assert found["vllm:prefix_cache_hits_total"] > 0
    *_, last = PROGRESS.findall(sparse_server.log.read_text())
    read, selections, p10, p50 = map(float, last)
    assert selections > 1000
    assert read < 95
    assert p50 >= MASS
    assert p10 >= 0.9 * MASS


@pytest.fixture(scope="module")
def drafting_server(engine: Engine, logs: Path) -> Iterator[Server]:
    """Drafts from the prompt beside sparse decode; few tokens a step, so that prompts mix with decoding."""
    variant = msgspec.structs.replace(
        engine,
        name="sparse-drafting",
        arguments=(
            "--enforce-eager",
            "--sparse-attention=tactic",
            f"--additional-config={json.dumps(SECTION)}",
            "--max-num-batched-tokens=256",
            f"--speculative-config={json.dumps(NGRAM)}",
        ),
    )
    server = engine_server(variant, logs)
    with serving([server]):
        yield server


def test_with_drafts_short_answers_are_a_plain_servers_and_long_ones_are_sparse(
    drafting_server: Server, plain_server: Server, model: str
) -> None:
    short = asks(6, 1500, 32)
    ours, plain = (ask_all(server.url, model, short) for server in (drafting_server, plain_server))
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in plain]
    drafted = samples(drafting_server.url)["vllm:spec_decode_num_drafts_total"]
    answers = ask_together(drafting_server.url, model, asks(6, 9000, 96, shared=4000), at_once=6)
    assert [len(answer.token_ids) for answer in answers] == [96] * 6
    found = samples(drafting_server.url)
    assert found["vllm:spec_decode_num_drafts_total"] > drafted > 0
    *_, last = PROGRESS.findall(drafting_server.log.read_text())
    read, selections, _, p50 = map(float, last)
    assert selections > 200
    assert read < 95
    assert p50 >= MASS
