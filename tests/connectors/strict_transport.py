"""A transport that holds its user to the contract."""

from __future__ import annotations

from penstock.connectors.geometry import Moves
from penstock.connectors.transports.base import State, Transfer, Transport


class Strict:
    """Holds a transport's user to the contract: connect, read, and disconnect only when nothing is active."""

    def __init__(self, inner: Transport) -> None:
        self.name, self.inner = inner.name, inner
        self.register, self.close = inner.register, inner.close
        self.active: list[tuple[str, Transfer]] = []
        self.connected: set[str] = set()

    def connect(self, endpoint: bytes) -> str:
        peer = self.inner.connect(endpoint)
        self.connected.add(peer)
        return peer

    def disconnect(self, peer: str) -> None:
        assert peer in self.connected, "disconnected twice"
        self._drop_ended()
        assert peer not in [p for p, _ in self.active], "disconnected while a transfer is active"
        self.connected.discard(peer)
        self.inner.disconnect(peer)

    def read(self, peer: str, moves: Moves) -> Transfer:
        assert peer in self.connected, "read from a peer that is not connected"
        transfer = self.inner.read(peer, moves)
        self.active.append((peer, transfer))
        return transfer

    def _drop_ended(self) -> None:
        self.active = [(p, t) for p, t in self.active if t.poll() is State.ACTIVE]
