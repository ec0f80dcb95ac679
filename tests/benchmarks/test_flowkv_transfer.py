"""Transfers between pools: block lists, the bytes that arrive, and what is claimed of the times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from penstock.benchmarks import flowkv_transfer as bench
from penstock.benchmarks.flowkv_memory import map_pool, pattern, words_at
from penstock.benchmarks.flowkv_movers import (
    BLOCKS_WHOLE,
    LAYERS_APART,
    PIECE_BY_PIECE,
    FlowKV,
    Job,
    OneDescriptor,
)
from penstock.connectors.runs import Run

CHURNED, FRESH = f"churned, {bench.LLAMA_8B.name}", f"fresh, {bench.LLAMA_8B.name}"


@dataclass
class Lists:
    source: list[Run]
    target: list[Run]


def lists(*lengths: int) -> list[Lists]:
    return [Lists([Run(10 * i, n)], [Run(10 * i, n)]) for i, n in enumerate(lengths)]


def test_the_8b_model_has_2_mib_a_block_in_one_strip_or_in_32():
    shape = bench.LLAMA_8B
    assert shape.block_bytes == 2 << 20
    assert len(shape.block_outermost(0, 10).strips) == 1
    assert [s.width for s in shape.layer_outermost(0, 10).strips] == [64 << 10] * 32


def test_transfers_are_paired_with_others_of_their_size_in_order():
    paired = bench.match(lists(4, 2, 4, 7), lists(4, 9, 2, 4))
    assert [p.stock.num_blocks for p in paired] == [4, 2, 4]
    assert [p.stock.num_blocks == p.flowkv.num_blocks for p in paired] == [True] * 3
    assert [p.flowkv.source[0].start for p in paired] == [0, 20, 30]


def test_a_job_lists_its_blocks_in_token_order():
    job = Job(Lists([Run(5, 2), Run(1, 1)], [Run(0, 3)]))
    assert (job.num_blocks, job.source_ids.tolist(), job.target_ids.tolist()) == (3, [5, 6, 1], [0, 1, 2])


def test_a_pool_repeats_its_memory():
    base = map_pool(3 << 16, 1 << 16)
    words = words_at(base, 3 << 16)
    words[: 1 << 13] = pattern(0, 1 << 16, 1 << 16)
    assert np.array_equal(words[1 << 13 : 1 << 14], pattern(1 << 16, 1 << 16, 1 << 16))
    assert len(set(words[: 1 << 13].tolist())) == 1 << 13


def timings(**seconds: list[float]) -> bench.Timings:
    names = {"apart": LAYERS_APART, "whole": BLOCKS_WHOLE, "calls": PIECE_BY_PIECE}
    names |= {"ours": FlowKV.name, "single": OneDescriptor.name}
    return {
        names[key]: bench.Timing(
            wall_s=took,
            cpu_s=took,
            calls=[1] * len(took),
            descriptors=[2] * len(took),
            num_bytes=[8] * len(took),
        )
        for key, took in seconds.items()
    }


def test_claims_are_ratios_of_the_same_requests():
    flat = [1.0] * 3
    found = {
        CHURNED: timings(
            apart=flat, whole=[4.0, 8.0, 2.0], ours=[1.0, 2.0, 1.0], single=[0.5, 1.0, 0.5], calls=[100.0] * 3
        ),
        FRESH: timings(apart=flat, whole=flat, ours=[1.1, 1.1, 1.1], single=flat, calls=flat),
        f"churned, {bench.LLAMA_8B_RANK.name}": timings(
            apart=flat, whole=flat, ours=flat, single=flat, calls=flat
        ),
    }
    claims = {claim.name: claim for claim in bench.claims_of(found)}
    assert {name: (claim.value, claim.holds) for name, claim in claims.items()} == {
        f"{CHURNED}: time P50 to best stock": (0.25, True),
        f"{CHURNED}: time P99 to best stock": (0.25, True),
        f"{CHURNED}: bandwidth to one descriptor's": (0.5, False),
        f"{CHURNED}: time saved to a call a block and layer": (0.99, True),
        f"{FRESH}: time P50 to best stock": (pytest.approx(1.1), False),
    }


def test_every_mover_takes_its_turn_to_be_first():
    assert [next(bench.turned("abc", by)) for by in range(4)] == ["a", "b", "c", "a"]
    assert "".join(bench.turned("abc", 1)) == "bca"
