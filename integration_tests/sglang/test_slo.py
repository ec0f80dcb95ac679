"""``--schedule-policy slo`` on a real server: plans, targets from API keys, and answers that stay stock's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial

import pytest
from engine_pair import eventually
from sglang_server import CHUNK, Refused, Serve, all_at_once, ask, generate, queried, series

from penstock.benchmarks.processes import Server

TARGETS = {"ttft_slo_ms": 60_000, "tpot_slo_ms": 5_000}
KEY = "a-key-of-gold"


@pytest.fixture(scope="module")
def server(serve: Serve) -> Iterator[Server]:
    digest = "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()
    gold = {"client": "gold", "ttft_slo_ms": 50_000, "tpot_slo_ms": 9_000}
    ours = json.dumps({"scheduler": {"policy": "slo", "clients": {digest: gold}}})
    arguments = ["--penstock-config", ours, "--enable-metrics", "--max-running-requests", "16"]
    with serve(*arguments, name="sglang-slo") as server:
        yield server


def prompt(seed: int, length: int) -> list[int]:
    return [10 + seed, *(10 + (seed * 131 + i * 7) % 500 for i in range(length - 1))]


def total(server: Server, name: str) -> float:
    return sum(series(server, name).values())


def test_answers_are_transformers_with_targets_and_without_and_targets_are_met(server: Server, greedy):
    lengths = [3, 60, CHUNK + 1, 3 * CHUNK + 5, 60, 2 * CHUNK, 90, 40]
    prompts = [prompt(index, length) for index, length in enumerate(lengths)]
    said = [TARGETS if index % 2 == 0 else {} for index in range(len(lengths))]
    calls = [
        partial(generate, server, row, 8, custom_params=one) for row, one in zip(prompts, said, strict=True)
    ]
    assert [answer["output_ids"] for answer in all_at_once(calls)] == [greedy(row, 8) for row in prompts]
    eventually("they are counted", lambda: total(server, "penstock_slo_requests") == 4)
    assert total(server, "penstock_slo_attained_requests") == 4
    assert total(server, "penstock_slo_plans") > total(server, "penstock_slo_passive_plans")
    assert total(server, "penstock_slo_measured_seconds") > 0
    assert total(server, "sglang:penstock_slo_requests") == 4
    assert {name for name in queried("slo") if not series(server, name)} == set()


def test_an_api_key_gives_its_requests_targets(server: Server):
    before = total(server, "penstock_slo_requests")
    body = {"model": "default", "prompt": prompt(30, 20), "max_tokens": 2}
    assert ask(server, "/v1/completions", body, Authorization=f"Bearer {KEY}")["choices"]
    assert ask(server, "/v1/completions", body, Authorization="Bearer another")["choices"]
    eventually("one is counted", lambda: total(server, "penstock_slo_requests") == before + 1)


@pytest.mark.parametrize(
    "said", [{"ttft_slo_ms": "soon"}, {"tpot_slo_ms": 0}, {"tpot_slo_ms": -5}, {"ttft_slo_ms": [1]}]
)
def test_a_target_that_cannot_be_is_refused(server: Server, said):
    (field,) = said
    with pytest.raises(Refused) as refused:
        generate(server, prompt(1, 5), 1, custom_params=said)
    assert refused.value.status == 400
    assert f"{field}: given" in refused.value.body
    assert generate(server, prompt(1, 5), 1)["output_ids"]
