"""``--disaggregation-transfer-backend flowkv``: two stock SGLang servers answer what one does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sglang_pair import PAGE, SglangPair, router_of, serving_sglang_pair
from sglang_server import CHUNK, all_at_once, ask, generate

from penstock.benchmarks.processes import Server
from penstock.benchmarks.servers import serving

TOKENS = 8
LENGTHS = (1, PAGE, PAGE + 1, 100, CHUNK, 3 * CHUNK + 5)


@pytest.fixture(scope="module")
def pair(model: str, logs: Path) -> Iterator[SglangPair]:
    with serving_sglang_pair(model, logs) as pair:
        yield pair


@pytest.fixture(scope="module")
def router(pair: SglangPair, logs: Path) -> Iterator[Server]:
    with serving([server := router_of(pair, logs)]):
        yield server


def prompt(seed: int, length: int) -> list[int]:
    return [10 + (seed * 131 + i * 7 + i * i) % 500 for i in range(length)]


def test_answers_are_those_of_one_server(pair: SglangPair, router: Server, greedy):
    prompts = [prompt(i, length) for i, length in enumerate(LENGTHS)]
    wanted = [greedy(row, TOKENS) for row in prompts]
    for _wave in range(2):
        answers = all_at_once([partial(generate, router, row, TOKENS) for row in prompts])
        assert [answer["output_ids"] for answer in answers] == wanted
