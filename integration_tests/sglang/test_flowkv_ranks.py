"""FlowKV between servers of two ranks: each rank reads the heads that its half of the model wrote, and both
take requests in one order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sglang_pair import PAGE, SglangPair, all_back, prompt, serving_sglang_pair
from sglang_server import CHUNK, all_at_once, series

TOKENS = 8
RANKS = 2
LENGTHS = (1, PAGE + 1, CHUNK, 3 * CHUNK + 5)


@pytest.fixture(scope="module")
def pair(model: str, logs: Path) -> Iterator[SglangPair]:
    cores = sorted(os.sched_getaffinity(0))
    # SGLang gives each rank a NUMA node of its own, unless it is told cores.
    bound = f"{cores[0]}|{cores[-1]}"
    ranks = ("--tp-size", str(RANKS), "--enable-metrics", "--schedule-policy", "dlpm")
    with serving_sglang_pair(model, logs, *ranks, name="ranks", SGLANG_CPU_OMP_THREADS_BIND=bound) as pair:
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
