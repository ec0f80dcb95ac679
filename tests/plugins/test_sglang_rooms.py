"""Rooms of a P/D pair of SGLang: chunks promised, read, verified, on real memory and by hand-moved time."""

from __future__ import annotations

import random
import secrets

import msgspec
import numpy as np
import pytest

from penstock.connectors.compat import CompatibilityRecord
from penstock.connectors.config import FlowKVConfig
from penstock.connectors.control import Reply
from penstock.connectors.digest import DramDigester
from penstock.connectors.errors import DigestMismatchError, HandOffError, MessageError, StaleReadError
from penstock.connectors.geometry import CacheGeometry, LayerPages, strips_of
from penstock.connectors.handoff import Address
from penstock.connectors.messages import Welcome
from penstock.connectors.receiver import Load, Outcome, Receiver
from penstock.connectors.sender import Sender
from penstock.connectors.transports.loopback import LoopbackTransport, Network
from penstock.plugins.sglang.incoming_rooms import Arrival, IncomingRooms
from penstock.plugins.sglang.outgoing_rooms import OutgoingRooms, RoomEnd
from penstock.plugins.sglang.room_messages import Chunk, Ending, Wanted, frames, from_decode, from_prefill

PAGES, PAGE_BYTES, PAGE_TOKENS = 64, 96, 4
PICKUP_S = 10.0
CONFIG = FlowKVConfig(transport="loopback", pickup_s=PICKUP_S)
ADDRESS = Address("10.0.0.1", 5600)
RECORD = CompatibilityRecord(
    engine="sglang 0.5",
    model="m",
    cache_dtype="float32",
    block_size=PAGE_TOKENS,
    tensor_parallel_size=1,
    num_layers=1,
    num_kv_heads=1,
    head_size=1,
    layout="tokens",
    attention_backend="any",
    packing="nhd",
    layer_order="0 to 1",
    strip_widths=(PAGE_BYTES,),
    digest="xxh3-64 full",
)
AUX = [b"first token", b"room"]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Memory:
    """A pool of pages with real bytes."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.bytes = draw.integers(0, 256, (PAGES, PAGE_BYTES), dtype=np.uint8)
        placed = strips_of([LayerPages(1, PAGE_BYTES, PAGE_BYTES, PAGE_BYTES)])
        self.geometry = CacheGeometry(self.bytes.ctypes.data, self.bytes.nbytes, PAGES, placed)


class Link:
    """Questions are answered on the spot."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._replies: list[Reply] = []

    def ask(self, address: Address, question: object) -> int:
        assert address == ADDRESS
        ticket = len(self._replies) + secrets.randbelow(1 << 30)
        self._replies.append(Reply(ticket, self._sender.answer(question)))
        return ticket

    def poll(self, wait_s: float = 0.0) -> list[Reply]:
        replies, self._replies = self._replies, []
        return replies

    def close(self) -> None:
        pass


class Reads:
    """A receiver without a thread; ``held`` keeps loads from beginning."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.held = False
        self._waiting: list[Load] = []

    def submit(self, load: Load) -> None:
        self._waiting.append(load)

    def outcomes(self) -> list[Outcome]:
        if self.held:
            return []
        for load in self._waiting:
            self._receiver.submit(load)
        self._waiting.clear()
        for _step in range(6):
            self._receiver.step()
        return self._receiver.outcomes()


class Pair:
    """Both ends, and the messages between them by hand."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.source, self.target = Memory(1), Memory(2)
        self.epochs = np.zeros(PAGES, dtype=np.uint32)
        network: Network = {}
        self.sender = Sender("prefill", ADDRESS, CONFIG, self.clock)
        self.sender.use_epochs(self.epochs)
        served = LoopbackTransport("p", network)
        endpoint = served.register(self.source.geometry)
        self.sender.open(
            {0: Welcome(self.sender.instance, RECORD, self.source.geometry, "loopback", endpoint)}
        )
        self.outgoing = OutgoingRooms(self.sender, DramDigester(self.source.geometry), "full", PAGE_TOKENS)
        transport = LoopbackTransport("d", network)
        transport.register(self.target.geometry)
        self.reads = Reads(
            Receiver(
                rank=0,
                record=RECORD,
                geometry=self.target.geometry,
                transport=transport,
                control=Link(self.sender),
                digester=DramDigester(self.target.geometry),
                config=CONFIG,
                clock=self.clock,
            )
        )
        self.incoming = IncomingRooms(self.reads, PAGE_TOKENS, ())

    def chunk(self, room: int, first: int, pages: list[int], total: int | None = None) -> Chunk:
        """What prefill says of computed pages; ``total`` where they are the last."""
        hand_off = msgspec.to_builtins(self.outgoing.offer(room, pages)) if pages else None
        if total is not None:
            self.outgoing.complete(room)
        ending = None if total is None else Ending(total, AUX)
        return from_prefill(frames(Chunk(room, first, hand_off, ending)))


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_chunks_arrive_in_any_order_and_both_ends_hear_of_it_once(pair: Pair):
    source, target = [7, 8, 9, 20, 21, 40], [1, 2, 3, 4, 50, 51]
    chunks = [pair.chunk(5, 0, source[:3]), pair.chunk(5, 3, source[3:5]), pair.chunk(5, 5, source[5:], 6)]
    pair.incoming.open(5, target)
    for chunk in reversed(chunks):
        assert pair.incoming.advance() == []
        pair.incoming.take(chunk)
    assert pair.incoming.is_reading(5)
    assert pair.outgoing.advance() == []
    # 7 to 9 go to 1 to 3, 20 to 4, 21 to 50, 40 to 51.
    assert pair.incoming.advance() == [Arrival(5, AUX, descriptors=4)]
    assert (pair.target.bytes[target] == pair.source.bytes[source]).all()
    seen = pair.incoming.take_stats()
    assert sorted(seen.num_bytes) == [PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES]
    assert sorted(seen.num_descriptors) == [1, 1, 2]
    assert pair.incoming.take_stats().is_empty
    assert not pair.incoming.is_reading(5)
    assert pair.outgoing.advance() == [RoomEnd(5)]
    assert pair.incoming.advance() == pair.outgoing.advance() == []
    assert len(pair.outgoing) == len(pair.sender.leases) == 0


def test_a_room_is_not_over_while_a_chunk_is_still_computed(pair: Pair):
    pair.incoming.open(5, [1, 2])
    pair.incoming.take(pair.chunk(5, 0, [3]))
    assert pair.incoming.advance() == pair.outgoing.advance() == []
    assert len(pair.sender.leases) == 0, "the first chunk was read meanwhile"
    pair.incoming.take(pair.chunk(5, 1, [4], 2))
    assert [arrival.room for arrival in pair.incoming.advance()] == [5]
    assert pair.outgoing.advance() == [RoomEnd(5)]


def test_a_run_of_pages_is_one_descriptor_on_both_sides_at_the_same_places(pair: Pair):
    pair.incoming.open(5, [10, 11, 12, 13, 30, 31])
    pair.incoming.take(pair.chunk(5, 0, [3, 4, 5, 6, 7, 8], 6))
    assert pair.incoming.advance() == [Arrival(5, AUX, descriptors=2)]


def test_a_room_whose_prefix_decode_had_needs_no_page(pair: Pair):
    pair.incoming.open(5, [])
    pair.incoming.take(pair.chunk(5, 0, [], 0))
    assert pair.incoming.advance() == [Arrival(5, AUX)]
    assert pair.outgoing.advance() == [RoomEnd(5)]


def test_what_nobody_reads_comes_back_when_its_time_is_over(pair: Pair):
    pair.chunk(5, 0, [1, 2])
    pair.clock.now += PICKUP_S / 2
    pair.chunk(5, 2, [3], 3)
    assert pair.outgoing.advance() == []
    pair.clock.now += PICKUP_S / 2
    (end,) = pair.outgoing.advance()
    assert end.room == 5
    assert "in time" in str(end.reason)
    assert pair.outgoing.take_stats().expired_leases == 1
    assert pair.outgoing.take_stats().is_empty
    assert len(pair.sender.leases) == 0


def test_pages_that_prefill_gave_up_are_not_believed(pair: Pair):
    pair.incoming.open(5, [1, 2])
    chunk = pair.chunk(5, 0, [3, 4], 2)
    pair.outgoing.forget(5)
    pair.incoming.take(chunk)
    (arrival,) = pair.incoming.advance()
    assert isinstance(arrival.error, StaleReadError)
    assert pair.incoming.take_stats().stale_reads_refused == 1
    assert pair.outgoing.take_stats().stale_reads_refused == 1
    assert pair.outgoing.advance() == []


def test_pages_that_were_handed_out_again_are_not_believed(pair: Pair):
    pair.incoming.open(5, [1, 2])
    chunk = pair.chunk(5, 0, [3, 4], 2)
    pair.epochs[4] += 1
    pair.incoming.take(chunk)
    (arrival,) = pair.incoming.advance()
    assert isinstance(arrival.error, StaleReadError)


def test_bytes_that_changed_after_they_were_hashed_are_not_believed(pair: Pair):
    pair.incoming.open(5, [1, 2])
    chunk = pair.chunk(5, 0, [3, 4], 2)
    pair.source.bytes[4, 17] ^= 1
    pair.incoming.take(chunk)
    (arrival,) = pair.incoming.advance()
    assert isinstance(arrival.error, DigestMismatchError)
    assert pair.incoming.take_stats().digest_mismatches == 1


def test_a_room_that_decode_forgets_is_still_read_until_its_reads_end(pair: Pair):
    pair.incoming.open(5, [1, 2])
    pair.incoming.take(pair.chunk(5, 0, [3, 4], 2))
    pair.reads.held = True
    pair.incoming.forget(5)
    pair.incoming.advance()
    assert pair.incoming.is_reading(5)
    pair.reads.held = False
    assert pair.incoming.advance() == []
    assert not pair.incoming.is_reading(5)


def test_a_room_number_used_again_does_not_get_the_pages_of_the_one_before(pair: Pair):
    pair.incoming.open(5, [1, 2])
    pair.incoming.take(pair.chunk(5, 0, [3, 4], 2))
    pair.incoming.forget(5)
    pair.incoming.open(5, [10, 11])
    assert pair.incoming.advance() == []
    pair.incoming.take(pair.chunk(5, 0, [6, 7], 2))
    assert pair.incoming.advance() == [Arrival(5, AUX, descriptors=1)]


@pytest.mark.parametrize(
    ("first", "pages", "total", "said"),
    [(1, 2, None, "of 2"), (0, 2, 3, "3 pages were handed off, of 2"), (0, 1, 1, "1 pages were handed off")],
)
def test_pages_that_do_not_fit_the_room_fail_it(
    pair: Pair, first: int, pages: int, total: int | None, said: str
):
    before = pair.target.bytes.copy()
    pair.incoming.open(5, [1, 2])
    pair.incoming.take(pair.chunk(5, first, list(range(20, 20 + pages)), total))
    (arrival,) = pair.incoming.advance()
    assert isinstance(arrival.error, HandOffError)
    assert pair.incoming.take_stats().failed_handshakes == 1
    assert said in str(arrival.error)
    assert (pair.target.bytes == before).all()


def test_a_host_that_is_not_allowed_is_not_asked(pair: Pair):
    rooms = IncomingRooms(pair.reads, PAGE_TOKENS, ("10.0.0.2",))
    rooms.open(5, [1])
    rooms.take(pair.chunk(5, 0, [3], 1))
    (arrival,) = rooms.advance()
    assert "allowed_hosts" in str(arrival.error)


@pytest.mark.parametrize("seed", range(20))
def test_many_rooms_at_once_end_as_one_by_one(pair: Pair, seed: int):
    draw = random.Random(seed)
    free, spare = list(range(PAGES)), list(range(PAGES))
    draw.shuffle(free)
    draw.shuffle(spare)
    wanted: dict[int, tuple[list[int], list[int]]] = {}
    chunks: list[Chunk] = []
    for room in range(draw.randint(1, 6)):
        size = draw.randint(1, 9)
        source, target = [free.pop() for _ in range(size)], [spare.pop() for _ in range(size)]
        wanted[room] = source, target
        pair.incoming.open(room, target)
        cut = draw.randint(0, size - 1)
        chunks += [pair.chunk(room, 0, source[:cut])] if cut else []
        chunks.append(pair.chunk(room, cut, source[cut:], size))
    draw.shuffle(chunks)
    arrived: list[int] = []
    ended: list[int] = []
    for chunk in chunks:
        pair.incoming.take(chunk)
        if draw.random() < 0.5:
            arrived += [arrival.room for arrival in pair.incoming.advance() if arrival.aux == AUX]
            ended += [end.room for end in pair.outgoing.advance() if end.reason is None]
    arrived += [arrival.room for arrival in pair.incoming.advance() if arrival.aux == AUX]
    ended += [end.room for end in pair.outgoing.advance() if end.reason is None]
    assert sorted(arrived) == sorted(ended) == sorted(wanted)
    for source, target in wanted.values():
        assert (pair.target.bytes[target] == pair.source.bytes[source]).all()


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"FLOWKV"],
        [b"OTHER", b"\x80"],
        [b"FLOWKV", b"\xc1"],
        [b"FLOWKV", b"\x80", b""],
        [b"FLOWKV", msgspec.msgpack.encode({"type": "wanted", "agent": "x", "room": 1})],
        [b"FLOWKV", msgspec.msgpack.encode({"type": "chunk", "room": -1, "first": 0, "hand_off": None})],
    ],
)
def test_what_is_no_message_is_refused(parts: list[bytes]):
    for read in (from_decode, from_prefill):
        with pytest.raises(MessageError):
            read(parts)


def test_a_message_survives_the_wire():
    wanted = Wanted("a" * 32, (1 << 63) - 1, "10.0.0.1", 5600, 32)
    assert from_decode(frames(wanted)) == wanted
