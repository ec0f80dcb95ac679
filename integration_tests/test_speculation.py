"""Drafts on real servers: the tokens are a plain server's, whoever drafts and whoever decides how much."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.benchmarks.asks import ask_together, churn_asks
from penstock.benchmarks.processes import Server
from penstock.benchmarks.servers import Engine, engine_server, serving
from penstock.benchmarks.tiny_model import TinyLlama, ensure_model

EAGER = ("--enforce-eager",)
SUFFIX = {
    "method": "custom_class",
    "model": "penstock.plugins.vllm.suffix_drafter.SuffixDrafter",
    "num_speculative_tokens": 5,
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 2,
}
CONTROLLED = {"penstock": {"scheduler": {"policy": "fcfs", "speculation": {}}}}
FAIR = {"penstock": {"scheduler": {"policy": "dlpm", "speculation": {"least_gain": 0.0}}}}
PLANNED = {
    "penstock": {
        "scheduler": {
            "policy": "slo",
            "speculation": {},
            "default_ttft_slo_ms": 20_000,
            "default_tpot_slo_ms": 200,
        }
    }
}

SETUPS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "suffix": (SUFFIX, None),
    "suffix-controlled": (SUFFIX, CONTROLLED),
    "ngram-fair": (NGRAM, FAIR),
    "suffix-planned": (SUFFIX, PLANNED),
}


@pytest.fixture(scope="module")
def repeating(engine: Engine) -> Engine:
    """A model that repeats itself, so that drafts come true."""
    model = str(ensure_model(TinyLlama(spread=0.02)))
    return msgspec.structs.replace(engine, model=model, name="repeating", arguments=EAGER)


@pytest.fixture(scope="module")
def expected(repeating: Engine, logs: Path) -> list[Any]:
    server = engine_server(repeating, logs)
    with serving([server]):
        return answers(server, repeating.model)


@pytest.fixture(scope="module", params=list(SETUPS))
def drafting(request: pytest.FixtureRequest, repeating: Engine, logs: Path) -> Iterator[tuple[str, Server]]:
    speculative, additional = SETUPS[request.param]
    arguments = [*EAGER, "--speculative-config", json.dumps(speculative)]
    if additional is not None:
        arguments += ["--additional-config", json.dumps(additional)]
    variant = msgspec.structs.replace(repeating, name=request.param, arguments=tuple(arguments))
    server = engine_server(variant, logs)
    with serving([server]):
        yield request.param, server


def answers(server: Server, model: str) -> list[Any]:
    """Requests of several lengths at once, and each of them again."""
    asks = churn_asks(12, seed=5)
    found = [ask_together(server.url, model, asks, at_once=6) for _ in range(2)]
    return [answer.token_ids for answers in found for answer in answers]


def series(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, _, value in found}


def test_tokens_are_those_without_speculation(drafting, repeating, expected):
    setup, server = drafting
    assert answers(server, repeating.model) == expected
    found = series(server)
    assert found["vllm:spec_decode_num_accepted_tokens_total"] > 0
    controlled = SETUPS[setup][1] is not None
    assert ("penstock_draft_tokens_allocated" in found) == controlled
    if controlled:
        assert found["penstock_draft_tokens_accepted"] <= found["penstock_draft_tokens_allocated"]
        assert found["penstock_draft_tokens_allocated"] > 0
