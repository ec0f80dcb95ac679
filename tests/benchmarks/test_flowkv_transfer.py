"""Transfers between pools: block lists, the bytes that arrive, and what is claimed of the times."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from penstock.benchmarks import flowkv_transfer as bench
from penstock.benchmarks.flowkv_memory import (
    DISTINCT_BYTES,
    Shape,
    connected_pools,
    map_pool,
    pattern,
    words_at,
)
from penstock.benchmarks.flowkv_movers import (
    BLOCKS_WHOLE,
    LAYERS_APART,
    PIECE_BY_PIECE,
    FlowKV,
    Job,
    OneDescriptor,
    check,
    make_movers,
)
from penstock.benchmarks.flowkv_sides import SideError, both_sides
from penstock.connectors.runs import Run

DEADLINE_S = 30.0
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


@pytest.mark.parametrize("family", ["stock", "FlowKV"])
def test_every_setup_moves_the_right_bytes_and_a_wrong_one_is_found(family):
    pytest.importorskip("nixl")
    shape = Shape("small", layers=4, page_bytes=4096)
    with connected_pools(family, shape, 96, 64) as pools:
        movers = make_movers(pools, shape)
        for mover in movers:
            check(mover, pools, shape)
        first = movers[0]
        first.name = BLOCKS_WHOLE if first.name == LAYERS_APART else LAYERS_APART
        with pytest.raises(RuntimeError, match="wrong bytes"):
            check(first, pools, shape)
    assert 96 * shape.block_bytes < DISTINCT_BYTES


def state_of(process: int) -> str:
    """The letter that the kernel has for what a process does; T is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_sides_take_turns_and_rest_out_of_turn():
    pytest.importorskip("nixl")
    shape = Shape("small", layers=4, page_bytes=4096)
    job = Job(Lists([Run(7, 2), Run(3, 1)], [Run(0, 3)]))
    with both_sides(shape, 96, 64) as sides:
        took = {name: side.move(name, job) for side in sides for name in side.movers}
        groups = [side._group for side in sides]
        deadline = time.monotonic() + DEADLINE_S
        while any(state_of(group) != "T" for group in groups):
            assert time.monotonic() < deadline, "a side does not rest"
        os.killpg(groups[0], signal.SIGKILL)
        with pytest.raises(SideError, match="stock side"):
            sides[0].move(LAYERS_APART, job)
    assert {name: (t.calls, t.descriptors) for name, t in took.items()} == {
        LAYERS_APART: (1, 12),
        BLOCKS_WHOLE: (1, 3),
        FlowKV.name: (1, 2),
        OneDescriptor.name: (1, 1),
        PIECE_BY_PIECE: (12, 12),
    }
    assert all(t.wall_s > 0 and t.cpu_s > 0 for t in took.values())
    assert not any(Path(f"/proc/{group}").exists() for group in groups)


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
