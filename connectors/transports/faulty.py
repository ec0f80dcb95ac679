"""A decorator that breaks any transport by a script: the public test kit for KV hand-off.

A script maps the number of a call (0, 1, 2 ...) to a fault, so that a test is deterministic. The faults are
the ones that happen: a post that fails, a transfer that fails half way, one that never ends until it is
cancelled, one that cannot even be cancelled for a while, and bytes that are not what was sent.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from enum import Enum

from penstock.connectors.errors import TransferFailedError
from penstock.connectors.geometry import CacheGeometry, Moves
from penstock.connectors.transports.base import State, Transfer, TransferStats, Transport


class Fault(Enum):
    """What happens to one read."""

    POST_FAILS = "post fails"
    HALF_THEN_FAILS = "half of the bytes land, then the transfer fails"
    HANGS = "never ends; can be cancelled"
    HANGS_HARD = "never ends; writes on until cancelling succeeds at the third try"
    FLIPS_A_BYTE = "ends well with one wrong byte"
    DROPS_A_DESCRIPTOR = "ends well without the last descriptor's bytes"


def seeded_script(seed: int, faults: Iterable[Fault], calls: int, share: float) -> dict[int, Fault]:
    """A script in which about ``share`` of ``calls`` reads suffer a fault, the same for the same seed."""
    rng = random.Random(seed)
    kinds = list(faults)
    return {call: rng.choice(kinds) for call in range(calls) if rng.random() < share}


class FaultyTransport:
    """Delegates to ``inner`` and applies the script's fault to the n-th read."""

    def __init__(self, inner: Transport, script: Mapping[int, Fault]) -> None:
        self.name = inner.name
        self.inner = inner
        self.script = script
        self.reads = 0

    def register(self, geometry: CacheGeometry) -> bytes:
        """As the inner transport."""
        return self.inner.register(geometry)

    def connect(self, endpoint: bytes) -> str:
        """As the inner transport."""
        return self.inner.connect(endpoint)

    def disconnect(self, peer: str) -> None:
        """As the inner transport."""
        self.inner.disconnect(peer)

    def close(self) -> None:
        """As the inner transport."""
        self.inner.close()

    def read(self, peer: str, moves: Moves) -> Transfer:
        """As the inner transport, unless the script says otherwise."""
        fault = self.script.get(self.reads)
        self.reads += 1
        match fault:
            case None:
                return self.inner.read(peer, moves)
            case Fault.POST_FAILS:
                raise TransferFailedError("scripted: post failed")
            case Fault.HALF_THEN_FAILS:
                self.inner.read(peer, _half(moves))
                return _Broken(cancels_needed=0)
            case Fault.HANGS:
                return _Broken(cancels_needed=1)
            case Fault.HANGS_HARD:
                return _Broken(cancels_needed=3, write=lambda: self.inner.read(peer, _half(moves)))
            case Fault.FLIPS_A_BYTE:
                transfer = self.inner.read(peer, moves)
                byte = ctypes.c_uint8.from_address(int(moves.target[-1]) + int(moves.length[-1]) - 1)
                byte.value ^= 0x40
                return transfer
            case Fault.DROPS_A_DESCRIPTOR:
                return self.inner.read(peer, _first(moves, len(moves) - 1))


def _first(moves: Moves, count: int) -> Moves:
    return Moves(moves.source[:count], moves.target[:count], moves.length[:count])


def _half(moves: Moves) -> Moves:
    """The first half of the bytes; most transfers are a single descriptor, so descriptors are cut."""
    return moves.part(0, moves.num_bytes // 2)


class _Broken:
    """A transfer that fails at once, or hangs until it was cancelled often enough and writes until then."""

    def __init__(self, cancels_needed: int, write: Callable[[], object] = lambda: None) -> None:
        self._cancels_needed = cancels_needed
        self._write = write

    def poll(self) -> State:
        return State.ACTIVE if self._cancels_needed else State.FAILED

    def cancel(self) -> bool:
        if self._cancels_needed:
            with suppress(TransferFailedError):
                self._write()
            self._cancels_needed -= 1
        return not self._cancels_needed

    def stats(self) -> TransferStats:
        raise AssertionError("a broken transfer has no figures")
