"""What a byte mover must offer: register memory once, connect to a peer, pull extents, say when done."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import msgspec

from penstock.connectors.geometry import CacheGeometry, Moves


class State(Enum):
    """Where a transfer stands; the last two are final, and memory is no longer written in either."""

    ACTIVE = "active"
    DONE = "done"
    FAILED = "failed"


class TransferStats(msgspec.Struct, frozen=True):
    """One finished transfer, in the terms of NIXL's telemetry."""

    num_descriptors: int
    num_bytes: int
    post_s: float
    """From the call to the return of the post, plan and preparation included."""
    transfer_s: float
    """From the start of the post to completion as the poller saw it."""


class Transfer(Protocol):
    """One posted pull."""

    def poll(self) -> State:
        """The transfer's state; cheap enough to call in a loop."""
        ...

    def cancel(self) -> bool:
        """Ask to stop. True once local memory is certain to be written no more; else poll on."""
        ...

    def stats(self) -> TransferStats:
        """Figures of a transfer that is done."""
        ...


class Transport(Protocol):
    """A byte mover of one rank."""

    name: str

    def register(self, geometry: CacheGeometry) -> bytes:
        """Make the whole allocation readable by peers; returns what a peer needs to connect."""
        ...

    def connect(self, endpoint: bytes) -> str:
        """Get ready to pull from the peer that made ``endpoint``; returns the peer's name."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer; no transfer from it is active."""
        ...

    def read(self, peer: str, moves: Moves) -> Transfer:
        """Pull: copy each ``source`` range of the peer to the local ``target`` range, as one transfer.

        Raises:
            TransferFailedError: the transfer cannot be posted; nothing was or will be written.
        """
        ...

    def close(self) -> None:
        """Deregister memory and drop all peers."""
        ...
