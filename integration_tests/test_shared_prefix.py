"""Shared prefixes on a real server, by the flag: tokens are a plain one's, whatever happens to requests."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.benchmarks.asks import Ask, ask_all, ask_together
from penstock.benchmarks.processes import Server
from penstock.benchmarks.scrape import samples
from penstock.benchmarks.servers import Engine, engine_server, serving
from penstock.benchmarks.tiny_model import corpus

SAMPLES = 8
SECTION = {"penstock": {"shared_prefix_attention": {"log_steps": 20}}}
SAVED = re.compile(r"shared prefixes: saved ([\d.]+) % of block reads in (\d+) steps")


@pytest.fixture(scope="module")
def sharing_server(engine: Engine, logs: Path) -> Iterator[Server]:
    """The cache is too small for all requests of ``test_when_requests_are_preempted``; two threads."""
    section = f"--additional-config={json.dumps(SECTION)}"
    variant = msgspec.structs.replace(
        engine,
        name="sharing",
        kv_blocks=300,
        threads=2,
        arguments=("--shared-prefix-attention=cascade", section),
    )
    server = engine_server(variant, logs)
    with serving([server]):
        yield server


def asks(count: int, shared: int, own: int, tokens: int) -> list[Ask]:
    """Prompts of which the first ``shared`` characters are alike."""
    text = corpus() * 10
    return [
        Ask(
            name=f"{number}",
            prompt=text[:shared] + f"{number}: " + text[97 * number :][:own],
            max_tokens=tokens,
        )
        for number in range(count)
    ]


def shared_steps(server: Server) -> float:
    return samples(server.url).get("penstock_shared_prefix_steps", 0.0)


def test_answers_to_prompts_that_begin_alike_are_a_plain_server_s(
    sharing_server: Server, plain_server: Server, model: str
) -> None:
    prompts = asks(SAMPLES, 7000, 40, 48)
    for server in (sharing_server, plain_server):
        # Whoever comes after finds the prefix cached.
        ask_all(server.url, model, prompts[:1])
    ours, plain = (
        ask_together(server.url, model, prompts, at_once=SAMPLES) for server in (sharing_server, plain_server)
    )
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in plain]
    assert shared_steps(sharing_server) > 20


def test_samples_of_one_prompt_read_it_once(sharing_server: Server, model: str) -> None:
    before = samples(sharing_server.url)
    body = {
        "model": model,
        "prompt": (corpus() * 10)[:9000],
        "n": SAMPLES,
        "seed": 5,
        "temperature": 1.0,
        "max_tokens": 40,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{sharing_server.url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=180) as answer:
        choices = json.load(answer)["choices"]
    assert len({choice["text"] for choice in choices}) == SAMPLES
    after = samples(sharing_server.url)
    name = "penstock_shared_prefix_"
    blocks, read = (after[name + key] - before[name + key] for key in ("blocks", "blocks_read"))
    assert read < blocks / 3


def test_when_requests_are_preempted_and_aborted_answers_are_a_plain_server_s(
    sharing_server: Server, plain_server: Server, model: str
) -> None:
    prompts = asks(12, 6000, 2500, 240)
    body = {
        "model": model,
        "prompt": prompts[0].prompt,
        "max_tokens": 400,
        "stream": True,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{sharing_server.url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=180) as stream:
        # Leaving in the middle of an answer aborts it, while the others decode.
        assert stream.readline().startswith(b"data:")
    ours, plain = (
        ask_together(server.url, model, prompts, at_once=12) for server in (sharing_server, plain_server)
    )
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in plain]
    found = samples(sharing_server.url)
    assert found["vllm:num_preemptions_total"] > 0
    assert found["vllm:prefix_cache_hits_total"] > 0


def test_the_log_says_what_was_saved(sharing_server: Server) -> None:
    *_, last = SAVED.findall(sharing_server.log.read_text())
    saved, steps = map(float, last)
    assert saved > 50
    assert steps >= 20
