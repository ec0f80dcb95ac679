"""The two sides of the transfer bench over real NIXL: the bytes that arrive, and whose turn it is."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.benchmarks.flowkv_memory import DISTINCT_BYTES, Shape, connected_pools
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


@dataclass(frozen=True)
class Transfer:
    """Three blocks, in two runs at the sender and one at the receiver."""

    source: tuple[Run, ...] = (Run(7, 2), Run(3, 1))
    target: tuple[Run, ...] = (Run(0, 3),)


@pytest.mark.parametrize("family", ["stock", "FlowKV"])
def test_every_setup_moves_the_right_bytes_and_a_wrong_one_is_found(family):
    shape = Shape("small", layers=4, page_bytes=4096)
    with connected_pools(family, shape, 96, 64) as pools:
        movers = make_movers(pools, shape)
        (last,) = make_movers(pools, shape, {movers[-1].name})
        assert last.name == movers[-1].name
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
    shape = Shape("small", layers=4, page_bytes=4096)
    job = Job(Transfer())
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
