"""Ways to pull one request's blocks over NIXL: the stock connector's, the paper's baseline, and FlowKV's."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from penstock.benchmarks.flowkv_memory import Pools, Shape, pattern, words_at
from penstock.connectors.geometry import CacheGeometry, plan_moves
from penstock.connectors.receiver_thread import READING_PAUSE_S
from penstock.connectors.runs import JointRun, Run, blocks_of, count_blocks, join_runs, runs_of
from penstock.connectors.transports.base import State, Transport
from penstock.connectors.transports.striped import StripedTransfer, StripedTransport


class BlockLists(Protocol):
    """What one request moves: runs at the source and at the target, in token order."""

    @property
    def source(self) -> Sequence[Run]: ...

    @property
    def target(self) -> Sequence[Run]: ...


class Job:
    """One request's blocks, in every form that a mover may want before the clock starts."""

    def __init__(self, lists: BlockLists) -> None:
        self.source, self.target = list(lists.source), list(lists.target)
        self.num_blocks = count_blocks(self.source)
        self.source_ids = np.fromiter(blocks_of(self.source), dtype=np.int64)
        self.target_ids = np.fromiter(blocks_of(self.target), dtype=np.int64)


class Mover(Protocol):
    """One way to pull."""

    name: str

    def move(self, job: Job) -> tuple[int, int]:
        """Pull the blocks and wait; returns calls into NIXL that post, and descriptors."""
        ...


class Prepared:
    """As vLLM 0.32 (``nixl/base_worker.py``): every piece of both pools prepared once, one READ a request.

    The request's descriptors are its blocks' pieces in request order, layer by layer.
    """

    def __init__(self, name: str, pools: Pools, source: CacheGeometry, target: CacheGeometry) -> None:
        self.name = name
        self._agent = pools.agent
        self._sizes = (source.num_blocks, target.num_blocks)
        self._strips = len(source.strips)
        self._remote = self._prepare(pools.peer, source)
        self._local = self._prepare("NIXL_INIT_AGENT", target)

    def _prepare(self, whose: str, geometry: CacheGeometry) -> object:
        rows = np.empty((len(geometry.strips), geometry.num_blocks, 3), dtype=np.uint64)
        for row, strip in zip(rows, geometry.strips, strict=True):
            row[:, 0] = geometry.base_address + strip.offset + np.arange(geometry.num_blocks) * strip.stride
            row[:, 1], row[:, 2] = strip.width, 0
        descriptors = self._agent.get_xfer_descs(rows.reshape(-1, 3), mem_type="DRAM")
        return self._agent.prep_xfer_dlist(whose, descriptors)

    def _ids(self, blocks: np.ndarray, num_blocks: int) -> np.ndarray:
        strips = np.arange(self._strips)[:, None] * num_blocks
        return (strips + blocks[None, :]).reshape(-1)

    def move(self, job: Job) -> tuple[int, int]:
        """One call, one descriptor a piece."""
        remote, local = self._ids(job.source_ids, self._sizes[0]), self._ids(job.target_ids, self._sizes[1])
        self._read(remote, local)
        return 1, len(remote)

    def _read(self, remote: np.ndarray, local: np.ndarray) -> None:
        agent = self._agent
        handle = agent.make_prepped_xfer("READ", self._local, local, self._remote, remote)
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(READING_PAUSE_S)
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"{self.name}: NIXL says {state}")
        agent.release_xfer_handle(handle)


class Calls(Prepared):
    """The baseline of FlowKV's paper (section 3.2): a call for each block of each layer."""

    def move(self, job: Job) -> tuple[int, int]:
        """As many calls as pieces."""
        remote, local = self._ids(job.source_ids, self._sizes[0]), self._ids(job.target_ids, self._sizes[1])
        for piece in range(len(remote)):
            self._read(remote[piece : piece + 1], local[piece : piece + 1])
        return len(remote), len(remote)


class FlowKV:
    """The plan of moves through FlowKV's transport, joined and planned while the clock runs."""

    name = "FlowKV"

    def __init__(self, pools: Pools, source: CacheGeometry, target: CacheGeometry) -> None:
        self._peer, self._source, self._target = pools.peer, source, target
        self._transport: Transport = pools.agent

    def move(self, job: Job) -> tuple[int, int]:
        """A call a lane, a descriptor a joint run and cut."""
        return self._pull(join_runs(job.source, job.target))

    def _pull(self, joint: Sequence[JointRun]) -> tuple[int, int]:
        transfer = self._transport.read(self._peer, plan_moves(self._source, self._target, joint))
        while (state := transfer.poll()) is State.ACTIVE:
            time.sleep(READING_PAUSE_S)
        if state is not State.DONE:
            raise RuntimeError(f"{self.name}: the transfer failed")
        calls = len(transfer.parts) if isinstance(transfer, StripedTransfer) else 1
        return calls, transfer.stats().num_descriptors


class OneDescriptor(FlowKV):
    """As many bytes in one piece on one lane."""

    name = "one descriptor"

    def __init__(self, pools: Pools, source: CacheGeometry, target: CacheGeometry) -> None:
        super().__init__(pools, source, target)
        if isinstance(self._transport, StripedTransport):
            self._transport = self._transport.lanes[0]

    def move(self, job: Job) -> tuple[int, int]:
        """One call, one descriptor."""
        return self._pull([JointRun(0, 0, job.num_blocks)])


LAYERS_APART = "NIXL, default layout"
BLOCKS_WHOLE = "NIXL, block-outermost"
PIECE_BY_PIECE = "a call a block and layer"


def make_movers(pools: Pools, shape: Shape, names: Collection[str] | None = None) -> tuple[Mover, ...]:
    """The ways of the pools' family, on the same memory: all, or those of ``names``."""
    ends = ((pools.source_base, pools.source_blocks), (pools.target_base, pools.target_blocks))
    apart = [shape.layer_outermost(*end) for end in ends]
    whole = [shape.block_outermost(*end) for end in ends]
    ways: dict[str, Callable[[], Mover]]
    if pools.family == "FlowKV":
        ways = {
            FlowKV.name: lambda: FlowKV(pools, *whole),
            OneDescriptor.name: lambda: OneDescriptor(pools, *whole),
        }
    else:
        ways = {
            LAYERS_APART: lambda: Prepared(LAYERS_APART, pools, *apart),
            BLOCKS_WHOLE: lambda: Prepared(BLOCKS_WHOLE, pools, *whole),
            PIECE_BY_PIECE: lambda: Calls(PIECE_BY_PIECE, pools, *apart),
        }
    return tuple(make() for name, make in ways.items() if names is None or name in names)


@dataclass(frozen=True, slots=True)
class Lists:
    """Block lists made by hand."""

    source: list[Run]
    target: list[Run]


def check(mover: Mover, pools: Pools, shape: Shape, *, blocks: int = 24) -> None:
    """Move a few scattered blocks and compare every byte that must have come.

    Raises:
        RuntimeError: a byte is wrong.
    """
    rng = np.random.default_rng(blocks)
    distinct = min(128, pools.target_blocks)
    job = Job(Lists(*(runs_of(rng.permutation(distinct)[:blocks].tolist()) for _ in range(2))))
    words_at(pools.target_base, distinct * shape.block_bytes)[:] = 0
    mover.move(job)
    if isinstance(mover, OneDescriptor):
        pieces = [(0, 0, blocks * shape.block_bytes)]
    elif mover.name in (LAYERS_APART, PIECE_BY_PIECE):
        pieces = [
            (
                (layer * pools.source_blocks + s) * shape.page_bytes,
                (layer * pools.target_blocks + t) * shape.page_bytes,
                shape.page_bytes,
            )
            for layer in range(shape.layers)
            for s, t in zip(job.source_ids.tolist(), job.target_ids.tolist(), strict=True)
        ]
    else:
        size = shape.block_bytes
        pieces = [
            (s * size, t * size, size)
            for s, t in zip(job.source_ids.tolist(), job.target_ids.tolist(), strict=True)
        ]
    for source, target, length in pieces:
        if not np.array_equal(words_at(pools.target_base + target, length), pattern(source, length)):
            raise RuntimeError(f"{mover.name}: wrong bytes at {target} of the target pool")
