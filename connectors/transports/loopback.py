"""A byte mover inside one process: real copies between real allocations, no network."""

from __future__ import annotations

import ctypes
import time
from collections.abc import MutableMapping

import msgspec

from penstock.connectors.errors import TransferFailedError
from penstock.connectors.geometry import CacheGeometry, Moves
from penstock.connectors.transports.base import State, TransferStats

Network = MutableMapping[str, CacheGeometry]
"""Allocations by agent name; two transports that share one mapping reach each other."""

_PROCESS: Network = {}


class _Endpoint(msgspec.Struct, frozen=True):
    name: str


class LoopbackTransport:
    """Copies as soon as a read is posted.

    Args:
        name: unique name on ``network``.
        network: who can be reached; the whole process by default.
    """

    name = "loopback"

    def __init__(self, name: str, network: Network | None = None) -> None:
        self._agent = name
        self._network = _PROCESS if network is None else network

    def register(self, geometry: CacheGeometry) -> bytes:
        """Publish the allocation under this agent's name."""
        self._network[self._agent] = geometry
        return msgspec.msgpack.encode(_Endpoint(self._agent))

    def connect(self, endpoint: bytes) -> str:
        """Look the peer up."""
        try:
            name = msgspec.msgpack.decode(endpoint, type=_Endpoint).name
        except msgspec.DecodeError as error:
            raise TransferFailedError(f"not an endpoint of the loopback network: {error}") from error
        if name not in self._network:
            raise TransferFailedError(f"no agent {name} on the loopback network")
        return name

    def disconnect(self, peer: str) -> None:
        """Nothing is kept for a peer."""

    def read(self, peer: str, moves: Moves) -> LoopbackTransfer:
        """Copy every move at once; each source range must lie in the peer's allocation."""
        started = time.perf_counter()
        geometry = self._network.get(peer)
        if geometry is None:
            raise TransferFailedError(f"agent {peer} is gone")
        offsets = moves.source - geometry.base_address
        if (offsets < 0).any() or (offsets + moves.length > geometry.size).any():
            raise TransferFailedError(f"a descriptor leaves the allocation of {peer}")
        for source, target, length in zip(moves.source, moves.target, moves.length, strict=True):
            ctypes.memmove(int(target), int(source), int(length))
        elapsed = time.perf_counter() - started
        return LoopbackTransfer(TransferStats(len(moves), moves.num_bytes, elapsed, elapsed))

    def close(self) -> None:
        """Leave the network."""
        self._network.pop(self._agent, None)


class LoopbackTransfer:
    """A copy that has already happened."""

    def __init__(self, stats: TransferStats) -> None:
        self._stats = stats

    def poll(self) -> State:
        """Always done."""
        return State.DONE

    def cancel(self) -> bool:
        """Nothing is in flight."""
        return True

    def stats(self) -> TransferStats:
        """Figures of the copy."""
        return self._stats
