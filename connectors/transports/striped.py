"""Several byte movers of one kind as one: a large read is cut into as many parts of equal size.

Over shared memory the thread that reads copies every byte itself, so that one mover is as fast as one core
copies; over a network further movers bring further connections. Each lane is a mover of its own, so a failed
or cancelled part follows the same rules as a whole transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

from penstock.connectors.errors import TransferFailedError
from penstock.connectors.geometry import CacheGeometry, Moves
from penstock.connectors.transports.base import State, Transfer, TransferStats, Transport

LEAST_BYTES = 4 << 20
"""Smallest part worth a lane: below, waking another thread costs more than it saves."""


class StripedTransport:
    """Reads over all ``lanes`` at once; peers see the first one only.

    Args:
        lanes: movers of one kind, with names of their own.
        least_bytes: smallest part that a further lane gets.
    """

    def __init__(self, lanes: Sequence[Transport], least_bytes: int = LEAST_BYTES) -> None:
        self.lanes = list(lanes)
        self.name = self.lanes[0].name
        self._least_bytes = least_bytes
        self._posters = ThreadPoolExecutor(max(1, len(self.lanes) - 1), thread_name_prefix="flowkv-lane")

    def register(self, geometry: CacheGeometry) -> bytes:
        """Register with every lane; peers connect to the first one."""
        endpoints = [lane.register(geometry) for lane in self.lanes]
        return endpoints[0]

    def connect(self, endpoint: bytes) -> str:
        """Connect every lane."""
        names = [lane.connect(endpoint) for lane in self.lanes]
        return names[0]

    def disconnect(self, peer: str) -> None:
        """Disconnect every lane, whatever one of them says."""
        errors = []
        for lane in self.lanes:
            try:
                lane.disconnect(peer)
            except TransferFailedError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def read(self, peer: str, moves: Moves) -> Transfer:
        """Post a part on each lane; a small read is the first lane's alone."""
        total = moves.num_bytes
        ways = min(len(self.lanes), total // self._least_bytes)
        if ways < 2:
            return self.lanes[0].read(peer, moves)
        cuts = [total * way // ways // 64 * 64 for way in range(ways)] + [total]
        first, *others = (moves.part(start, stop) for start, stop in pairwise(cuts))
        posting = [
            self._posters.submit(lane.read, peer, part)
            for lane, part in zip(self.lanes[1:], others, strict=False)
        ]
        return StripedTransfer([_posted(self.lanes[0], peer, first), *posting])

    def close(self) -> None:
        """Close every lane."""
        self._posters.shutdown()
        for lane in self.lanes:
            lane.close()


def _posted(lane: Transport, peer: str, moves: Moves) -> Future[Transfer]:
    """A read posted on this thread. One that cannot be posted fails like the others, in ``poll``."""
    future: Future[Transfer] = Future()
    try:
        future.set_result(lane.read(peer, moves))
    except TransferFailedError as error:
        future.set_exception(error)
    return future


class _Part:
    """One lane's share, from before it is posted."""

    def __init__(self, posting: Future[Transfer]) -> None:
        self._posting = posting

    @property
    def running(self) -> bool:
        """Whether it is being posted now: nobody can stop it until that ends."""
        return self._posting.running()

    @property
    def transfer(self) -> Transfer | None:
        """The posted transfer; None while it is being posted and where it could not be."""
        if not self._posting.done() or self._posting.cancelled():
            return None
        if isinstance(self._posting.exception(), TransferFailedError):
            return None
        return self._posting.result()

    def poll(self) -> State:
        if not self._posting.done():
            return State.ACTIVE
        transfer = self.transfer
        return State.FAILED if transfer is None else transfer.poll()

    def cancel(self) -> bool:
        if not self._posting.done() and not self._posting.cancel():
            return False
        transfer = self.transfer
        return transfer is None or transfer.cancel()


class StripedTransfer:
    """Done when all parts are, failed when one has failed and none of the others can write any more."""

    def __init__(self, posting: Sequence[Future[Transfer]]) -> None:
        self.parts = [_Part(future) for future in posting]

    def poll(self) -> State:
        """The state of the whole; a failed part stops the others."""
        states = [part.poll() for part in self.parts]
        if State.FAILED in states:
            return State.FAILED if self.cancel() else State.ACTIVE
        return State.ACTIVE if State.ACTIVE in states else State.DONE

    def cancel(self) -> bool:
        """Cancel every part; True once none of them can write."""
        still = [part for part in self.parts if not part.cancel()]
        return not still

    def stats(self) -> TransferStats:
        """Sums of bytes and descriptors; the longest of the times."""
        parts = [transfer.stats() for part in self.parts if (transfer := part.transfer) is not None]
        return TransferStats(
            num_descriptors=sum(part.num_descriptors for part in parts),
            num_bytes=sum(part.num_bytes for part in parts),
            post_s=max(part.post_s for part in parts),
            transfer_s=max(part.transfer_s for part in parts),
        )
