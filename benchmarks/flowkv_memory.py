"""KV pools of real size in little memory, one of them in a process of its own, both registered with NIXL.

A pool's addresses are laid over a smaller stretch of memory again and again, so that a pool of 12,000 blocks
of 2 MiB fits a small machine: NIXL sees 24 GiB of addresses, the caches see the smaller stretch, which is
many times their size. Every page is mapped before anything is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.connectors.config import FlowKVConfig
from penstock.connectors.geometry import CacheGeometry, LayerPages, strips_of
from penstock.connectors.transports.factory import make_transport

Family = Literal["stock", "FlowKV"]
"""Whose agents two pools are registered with: those of vLLM's NixlConnector, or FlowKV's."""

DISTINCT_BYTES = 512 << 20
STOCK_THREADS = 4
"""UCX worker threads of vLLM's NixlConnector unless ``num_threads`` is configured."""
WORD = 0x9E3779B97F4A7C15
_MAP_FIXED = 0x10
_MAP_POPULATE = 0x8000
_MAP_NORESERVE = 0x4000


class Shape(msgspec.Struct, frozen=True):
    """KV cache of one rank: ``layers`` pages of ``page_bytes`` a block."""

    name: str
    layers: int
    page_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.layers * self.page_bytes

    def block_outermost(self, base: int, num_blocks: int) -> CacheGeometry:
        """``BLHNC``: all layers of a block lie together."""
        return self._geometry(base, num_blocks, self.page_bytes, self.block_bytes)

    def layer_outermost(self, base: int, num_blocks: int) -> CacheGeometry:
        """``LBHNC``: all blocks of a layer lie together."""
        return self._geometry(base, num_blocks, num_blocks * self.page_bytes, self.page_bytes)

    def _geometry(self, base: int, num_blocks: int, layer_stride: int, block_stride: int) -> CacheGeometry:
        pages = LayerPages(self.layers, layer_stride, block_stride, self.page_bytes)
        return CacheGeometry(base, num_blocks * self.block_bytes, num_blocks, strips_of([pages]))


def map_pool(num_bytes: int, distinct_bytes: int = DISTINCT_BYTES) -> int:
    """Address of ``num_bytes`` whose contents repeat every ``distinct_bytes``. Kept until the process ends.

    Raises:
        OSError: the kernel has no room for it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def place(address: int | None, length: int, flags: int, file: int) -> int:
        found: int = libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
        if found == ctypes.c_void_p(-1).value:
            raise OSError(
                ctypes.get_errno(), f"mmap of {length >> 20} MiB: {os.strerror(ctypes.get_errno())}"
            )
        return found

    memory = os.memfd_create("kv-pool")
    try:
        os.ftruncate(memory, min(distinct_bytes, num_bytes))
        base = place(None, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        for start in range(0, num_bytes, distinct_bytes):
            length = min(distinct_bytes, num_bytes - start)
            place(base + start, length, mmap.MAP_SHARED | _MAP_FIXED | _MAP_POPULATE, memory)
    finally:
        os.close(memory)
    return base


def words_at(base: int, num_bytes: int) -> npt.NDArray[np.uint64]:
    """Memory as 64-bit words; a view."""
    memory = memoryview((ctypes.c_uint8 * num_bytes).from_address(base)).cast("B")
    return np.frombuffer(memory, dtype=np.uint64)


def pattern(offset: int, num_bytes: int, distinct_bytes: int = DISTINCT_BYTES) -> npt.NDArray[np.uint64]:
    """What a source pool holds at ``offset``: every word of the distinct stretch differs."""
    words = (np.arange(num_bytes // 8, dtype=np.uint64) + np.uint64(offset // 8)) % np.uint64(
        distinct_bytes // 8
    )
    return words * np.uint64(WORD)


class Source(msgspec.Struct, frozen=True):
    """What the process with the source pool tells."""

    base: int
    agent: bytes
    """The stock agent's metadata, or FlowKV's endpoint."""


@dataclass(frozen=True, slots=True)
class Pools:
    """Both ends, connected in the way of one family."""

    family: Family
    source_base: int
    source_blocks: int
    target_base: int
    target_blocks: int
    agent: Any
    """The target's: a stock NIXL agent, or FlowKV's transport as a decode server has it."""
    peer: str


def stock_agent(name: str) -> Any:
    """An agent with the settings of vLLM 0.32's NixlConnector."""
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(num_threads=STOCK_THREADS, capture_telemetry=True))


@contextlib.contextmanager
def registered(family: Family, name: str, geometry: CacheGeometry) -> Iterator[tuple[Any, bytes]]:
    """An agent of ``family`` that knows the pool, and what a peer needs to connect to it."""
    if family == "FlowKV":
        transport = make_transport(FlowKVConfig(), name, serves=name == "source", reads=name == "target")
        try:
            yield transport, transport.register(geometry)
        finally:
            transport.close()
        return
    agent = stock_agent(name)
    region = agent.register_memory([(geometry.base_address, geometry.size, 0, "")], mem_type="DRAM")
    try:
        yield agent, agent.get_agent_metadata()
    finally:
        agent.deregister_memory(region)


def hold_source(pipe: Connection, family: Family, shape: Shape, num_blocks: int) -> None:
    """Body of the source process: make a pool, say where it is, keep it until told to end."""
    num_bytes = num_blocks * shape.block_bytes
    base = map_pool(num_bytes)
    distinct = min(DISTINCT_BYTES, num_bytes)
    words_at(base, distinct)[:] = pattern(0, distinct)
    with registered(family, "source", shape.block_outermost(base, num_blocks)) as (_, agent):
        pipe.send_bytes(msgspec.msgpack.encode(Source(base, agent)))
        with contextlib.suppress(EOFError):
            pipe.recv_bytes()


@contextlib.contextmanager
def connected_pools(family: Family, shape: Shape, source_blocks: int, target_blocks: int) -> Iterator[Pools]:
    """A source pool in a child process and a target pool here, ready to transfer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=hold_source, args=(theirs, family, shape, source_blocks), daemon=True)
    child.start()
    theirs.close()
    try:
        base = map_pool(target_blocks * shape.block_bytes)
        with registered(family, "target", shape.block_outermost(base, target_blocks)) as (agent, _):
            source = msgspec.msgpack.decode(ours.recv_bytes(), type=Source)
            connect = agent.connect if family == "FlowKV" else agent.add_remote_agent
            peer = _text(connect(source.agent))
            yield Pools(family, source.base, source_blocks, base, target_blocks, agent, peer)
    finally:
        ours.close()
        child.join(10)
        child.terminate()


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
