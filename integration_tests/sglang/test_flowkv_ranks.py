"""FlowKV between servers of two ranks: each rank reads the heads that its half of the model wrote, both take
requests in one order, each chooses pages of its own heads, and some requests have an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from engine_pair import eventually
from sglang_pair import PAGE, SglangPair, all_back, prompt, serving_sglang_pair
from sglang_server import CHUNK, all_at_once, ask, series

TOKENS = 8
RANKS = 2
ADAPTER = "adapter"
LENGTHS = (1, PAGE + 1, CHUNK, 3 * CHUNK + 5)
EVERY_PAGE = {"sparse_attention": {"least_tokens": CHUNK, "budget": 1.0, "most_share": 1.0}}
"""Tokens must be those of dense attention."""


@pytest.fixture(scope="module")
def pair(model: str, logs: Path, adapter) -> Iterator[SglangPair]:
    cores = sorted(os.sched_getaffinity(0))
    # SGLang gives each rank a NUMA node of its own, unless it is told cores.
    bound = f"{cores[0]}|{cores[-1]}"
    ranks = ("--tp-size", str(RANKS), "--enable-metrics", "--schedule-policy", "dlpm")
    sparse = ("--attention-backend", "tactic", "--penstock-config", json.dumps(EVERY_PAGE))
    lora = ("--enable-lora", "--lora-paths", f"{ADAPTER}={adapter[0]}", "--lora-backend", "torch_native")
    named = {"name": "ranks", "SGLANG_CPU_OMP_THREADS_BIND": bound}
    with serving_sglang_pair(model, logs, *ranks, *sparse, *lora, **named) as pair:
        yield pair


def test_two_ranks_answer_what_one_does_and_each_moves_its_part(pair: SglangPair, greedy):
    prompts = [prompt(300 + i, length) for i, length in enumerate(LENGTHS)]
    wanted = [greedy(row, TOKENS) for row in prompts]
    for _wave in range(2):
        answers = all_at_once([partial(pair.generate, row, TOKENS) for row in prompts])
        assert [answer["output_ids"] for answer in answers] == wanted
    all_back(pair.prefill, pair.decode)
    moved = series(pair.decode, "sglang:flowkv_bytes_transferred_sum")
    by_rank = {
        label: value for labels, value in moved.items() for label in labels.split(",") if "tp_rank" in label
    }
    assert set(by_rank) == {f'tp_rank="{rank}"' for rank in range(RANKS)}
    assert len(set(by_rank.values())) == 1


def test_prompts_under_an_adapter_are_computed_moved_and_cached_apart(pair: SglangPair, greedy, adapter):
    """The same prompts with the adapter and without, at once and again from the caches."""
    _, adapted = adapter
    prompts = [prompt(320 + i, length) for i, length in enumerate(LENGTHS)]
    wanted = [say(row, TOKENS) for row in prompts for say in (greedy, adapted)]
    assert wanted[::2] != wanted[1::2]

    def asked(row: list[int], name: str | None) -> list[int]:
        body = pair.body(row, TOKENS) | {"lora_path": name}
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ask, pair.prefill, "/generate", body)
            found: list[int] = ask(pair.decode, "/generate", body)["output_ids"]
        return found

    for _wave in range(2):
        calls = [partial(asked, row, name) for row in prompts for name in (None, ADAPTER)]
        assert all_at_once(calls) == wanted
    all_back(pair.prefill, pair.decode)


def test_one_rank_speaks_for_an_engine_whose_ranks_all_choose_pages(pair: SglangPair):
    """``pair`` has answered; two ranks under one label would overwrite each other."""
    pair.generate(prompt(310, 2 * CHUNK), TOKENS)
    eventually("pages were chosen", lambda: chosen(pair, "penstock_sparse_selections") > 0)
    shown = series(pair.decode, "sglang:penstock_sparse_selections")
    assert [label for labels in shown for label in labels.split(",") if "tp_rank" in label] == ['tp_rank="0"']
    assert chosen(pair, "penstock_sparse_selections") == sum(shown.values())


def chosen(pair: SglangPair, name: str) -> float:
    return sum(series(pair.decode, name).values())
