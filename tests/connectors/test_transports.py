"""Byte movers: the contract of a transport, on loopback and real NIXL over DRAM, and the fault kit itself."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.connectors.config import FlowKVConfig
from penstock.connectors.errors import FlowKVError, TransferFailedError
from penstock.connectors.geometry import CacheGeometry, Moves, Strip, plan_moves
from penstock.connectors.runs import JointRun
from penstock.connectors.transports.base import State, Transfer, Transport
from penstock.connectors.transports.factory import make_transport
from penstock.connectors.transports.faulty import Fault, FaultyTransport, seeded_script
from penstock.connectors.transports.loopback import LoopbackTransport
from penstock.connectors.transports.striped import StripedTransport

BLOCKS, BYTES = 16, 4096
RUNS = [JointRun(0, 3, 2), JointRun(9, 7, 5), JointRun(5, 0, 1)]
DEADLINE_S = 30.0


class Side:
    """One rank: memory, its geometry and a transport with it registered."""

    def __init__(self, transport: Transport, fill: int, device: int = 0) -> None:
        self.memory = np.full(BLOCKS * BYTES, fill, dtype=np.uint8)
        self.geometry = CacheGeometry(
            self.memory.ctypes.data, self.memory.nbytes, BLOCKS, (Strip(0, BYTES, BYTES),), device=device
        )
        self.transport = transport
        self.endpoint = transport.register(self.geometry)


def ended(transfer: Transfer) -> State:
    deadline = time.monotonic() + DEADLINE_S
    while (state := transfer.poll()) is State.ACTIVE:
        assert time.monotonic() < deadline
    return state


@pytest.fixture(scope="module", params=["loopback", "nixl"])
def sides(request) -> Iterator[tuple[Side, Side]]:
    """Sender and receiver on devices of different numbers; one pair of NIXL agents serves all tests here."""
    if request.param == "nixl":
        pytest.importorskip("nixl")
    config = FlowKVConfig(transport=request.param)
    pair = Side(make_transport(config, "sender"), 0, device=1), Side(make_transport(config, "receiver"), 0)
    yield pair
    for side in pair:
        side.transport.close()


@pytest.fixture
def filled(sides) -> tuple[Side, Side, str]:
    """Random bytes at the sender, zeros at the receiver, and the sender's name."""
    sender, receiver = sides
    sender.memory[:] = np.random.default_rng(0).integers(1, 256, sender.memory.nbytes, dtype=np.uint8)
    receiver.memory[:] = 0
    return sender, receiver, receiver.transport.connect(sender.endpoint)


def test_a_read_moves_exactly_its_ranges(filled):
    sender, receiver, peer = filled
    expected = receiver.memory.copy()
    for run in RUNS:
        source = sender.memory[run.source * BYTES : (run.source + run.length) * BYTES]
        expected[run.target * BYTES : (run.target + run.length) * BYTES] = source
    transfer = receiver.transport.read(peer, plan_moves(sender.geometry, receiver.geometry, RUNS))
    assert ended(transfer) is State.DONE
    assert (receiver.memory == expected).all()
    assert transfer.poll() is State.DONE
    stats = transfer.stats()
    assert (stats.num_descriptors, stats.num_bytes) == (3, 8 * BYTES)
    assert 0 <= stats.post_s <= stats.transfer_s
    assert transfer.cancel()
    assert transfer.poll() is State.DONE


def test_many_reads_at_once(filled):
    sender, receiver, peer = filled
    transfers = [
        receiver.transport.read(
            peer, plan_moves(sender.geometry, receiver.geometry, [JointRun(i, BLOCKS - 1 - i, 1)])
        )
        for i in range(BLOCKS)
    ]
    assert {ended(transfer) for transfer in transfers} == {State.DONE}
    ours, theirs = receiver.memory.reshape(BLOCKS, BYTES), sender.memory.reshape(BLOCKS, BYTES)
    assert (ours == theirs[::-1]).all()


@pytest.mark.parametrize("outside", [-BYTES, BLOCKS * BYTES, 1 << 40])
def test_a_range_outside_the_peers_allocation_writes_nothing(filled, outside):
    sender, receiver, peer = filled
    moves = plan_moves(sender.geometry, receiver.geometry, RUNS)
    moves.source[-1] = sender.geometry.base_address + outside
    with pytest.raises(TransferFailedError):
        receiver.transport.read(peer, moves)
    assert not receiver.memory.any()


@pytest.mark.parametrize("endpoint", [b"", b"garbage", b"\xff" * 400])
def test_an_endpoint_that_makes_no_sense_is_a_typed_error(sides, endpoint):
    with pytest.raises(TransferFailedError):
        sides[1].transport.connect(endpoint)


def test_a_peer_that_nobody_knows_is_a_typed_error(filled):
    sender, receiver, _ = filled
    with pytest.raises(TransferFailedError):
        receiver.transport.read("nobody", plan_moves(sender.geometry, receiver.geometry, RUNS))


def test_a_peer_can_be_met_again(filled):
    sender, receiver, peer = filled
    receiver.transport.disconnect(peer)
    peer = receiver.transport.connect(sender.endpoint)
    assert receiver.transport.connect(sender.endpoint) == peer
    transfer = receiver.transport.read(peer, plan_moves(sender.geometry, receiver.geometry, RUNS))
    assert ended(transfer) is State.DONE


def test_nixl_between_two_processes_and_after_the_sender_was_killed():
    """kill -9 of the sender: the read ends with an error or wrong bytes, never for ever."""
    pytest.importorskip("nixl")
    program = (
        "import sys, numpy as np\n"
        "from penstock.connectors.geometry import CacheGeometry, Strip\n"
        "from penstock.connectors.transports.nixl import NixlTransport\n"
        "import msgspec\n"
        f"memory = np.full({BLOCKS * BYTES}, 7, dtype=np.uint8)\n"
        f"strips = (Strip(0, {BYTES}, {BYTES}),)\n"
        f"geometry = CacheGeometry(memory.ctypes.data, memory.nbytes, {BLOCKS}, strips)\n"
        "transport = NixlTransport('other-process')\n"
        "message = msgspec.json.encode([geometry, transport.register(geometry)])\n"
        "print('READY ' + message.decode(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        import msgspec

        line = next(line for line in child.stdout if line.startswith("READY "))
        geometry, endpoint = msgspec.json.decode(line[6:], type=tuple[CacheGeometry, bytes])
        receiver = Side(make_transport(FlowKVConfig(transport="nixl"), "reader", serves=False), 0)
        peer = receiver.transport.connect(endpoint)
        moves = plan_moves(geometry, receiver.geometry, RUNS)
        assert ended(receiver.transport.read(peer, moves)) is State.DONE
        assert (receiver.memory == 7).sum() == 8 * BYTES
    finally:
        child.kill()
        child.wait()
    try:
        transfer = receiver.transport.read(peer, moves)
    except TransferFailedError:
        return
    deadline = time.monotonic() + 2.0
    while transfer.poll() is State.ACTIVE and time.monotonic() < deadline:
        continue
    while not transfer.cancel():
        assert time.monotonic() < deadline + DEADLINE_S, "NIXL does not let go of a dead peer"


def test_unknown_names_are_refused_with_what_is_there():
    with pytest.raises(FlowKVError, match="'pigeon'; allowed: nixl, loopback"):
        make_transport(FlowKVConfig(transport="pigeon"), "x")
    pytest.importorskip("nixl")
    with pytest.raises(FlowKVError, match=r"no plugin NOPE; available: .*UCX"):
        make_transport(FlowKVConfig(transport="nixl", nixl_backends=("NOPE",)), "x")


class Striped:
    """A sender and a striped receiver whose lanes break by scripts of their own."""

    def __init__(self, *scripts: dict[int, Fault]) -> None:
        network: dict[str, CacheGeometry] = {}
        self.sender = Side(LoopbackTransport("s", network), 0)
        self.sender.memory[:] = np.random.default_rng(1).integers(1, 256, BLOCKS * BYTES, dtype=np.uint8)
        self.lanes = [
            FaultyTransport(LoopbackTransport(f"r{i}", network), script) for i, script in enumerate(scripts)
        ]
        self.transport = StripedTransport(self.lanes, least_bytes=BYTES)
        self.receiver = Side(self.transport, 0)
        self.peer = self.transport.connect(self.sender.endpoint)

    def read(self, runs: list[JointRun] = RUNS) -> Transfer:
        moves = plan_moves(self.sender.geometry, self.receiver.geometry, runs)
        return self.transport.read(self.peer, moves)

    def landed(self, runs: list[JointRun] = RUNS) -> bool:
        """Whether exactly the bytes of ``runs`` are at the receiver."""
        expected = np.zeros_like(self.receiver.memory)
        for run in runs:
            source = self.sender.memory[run.source * BYTES : (run.source + run.length) * BYTES]
            expected[run.target * BYTES : (run.target + run.length) * BYTES] = source
        return bool((self.receiver.memory == expected).all())


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 16])
def test_a_striped_read_brings_every_byte_once(lanes):
    striped = Striped(*[{}] * lanes)
    transfer = striped.read()
    assert ended(transfer) is State.DONE
    assert striped.landed()
    assert [lane.reads for lane in striped.lanes] == [1] * min(lanes, 8) + [0] * max(0, lanes - 8)
    stats = transfer.stats()
    assert stats.num_bytes == 8 * BYTES
    assert len(RUNS) <= stats.num_descriptors <= len(RUNS) + min(lanes, 8) - 1
    assert transfer.cancel()
    assert transfer.poll() is State.DONE
    striped.transport.close()


def test_a_small_read_is_one_lane_s():
    striped = Striped({}, {})
    assert ended(striped.read([JointRun(2, 5, 1)])) is State.DONE
    assert [lane.reads for lane in striped.lanes] == [1, 0]


@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("fault", [Fault.POST_FAILS, Fault.HALF_THEN_FAILS])
def test_one_failed_part_fails_the_whole(fault, broken):
    striped = Striped(*({0: fault} if lane == broken else {} for lane in range(3)))
    transfer = striped.read()
    assert ended(transfer) is State.FAILED
    assert transfer.cancel()
    assert transfer.poll() is State.FAILED
    striped.receiver.memory[:] = 0
    assert ended(striped.read()) is State.DONE
    assert striped.landed()


def test_a_failed_part_is_told_only_when_the_others_can_write_no_more():
    striped = Striped({0: Fault.POST_FAILS}, {0: Fault.HANGS_HARD})
    transfer = striped.read()
    polls = [transfer.poll()]
    while polls[-1] is State.ACTIVE:
        striped.receiver.memory[:] = 0
        polls.append(transfer.poll())
    assert polls[-1] is State.FAILED
    assert len(polls) >= 3
    striped.receiver.memory[:] = 0
    assert transfer.poll() is State.FAILED
    assert not striped.receiver.memory.any()


def test_a_part_that_is_still_being_posted_cannot_be_cancelled():
    gate = threading.Event()

    class Slow(LoopbackTransport):
        def read(self, peer, moves):
            gate.wait(DEADLINE_S)
            return super().read(peer, moves)

    striped = Striped({}, {})
    striped.lanes[1].inner.__class__ = Slow
    transfer = striped.read()
    assert transfer.poll() is State.ACTIVE
    deadline = time.monotonic() + DEADLINE_S
    while not transfer.parts[1].running and time.monotonic() < deadline:
        continue
    assert not transfer.cancel()
    gate.set()
    assert ended(transfer) is State.DONE
    assert striped.landed()


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 6000), max_size=6),
)
def test_parts_of_moves_hold_every_byte_once_and_in_order(lengths, cuts):
    starts = np.cumsum([0, *lengths[:-1]])
    moves = Moves(starts * 3, starts * 5, np.array(lengths))
    total = sum(lengths)
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    parts = [moves.part(start, stop) for start, stop in pairwise(edges)]

    def addresses(some: Moves) -> list[tuple[int, int]]:
        return [
            (int(s) + i, int(t) + i)
            for s, t, n in zip(some.source, some.target, some.length, strict=True)
            for i in range(int(n))
        ]

    assert [part.num_bytes for part in parts] == [stop - start for start, stop in pairwise(edges)]
    assert [pair for part in parts for pair in addresses(part)] == addresses(moves)


def faulty(script: dict[int, Fault]) -> tuple[FaultyTransport, Side, Side, str]:
    network = {}
    sender = Side(LoopbackTransport("s", network), 9)
    transport = FaultyTransport(LoopbackTransport("r", network), script)
    receiver = Side(transport, 0)
    return transport, sender, receiver, transport.connect(sender.endpoint)


@pytest.mark.parametrize(
    ("fault", "state", "landed"),
    [
        (None, State.DONE, 8 * BYTES),
        (Fault.HALF_THEN_FAILS, State.FAILED, 4 * BYTES),
        (Fault.HANGS, State.ACTIVE, 0),
        (Fault.HANGS_HARD, State.ACTIVE, 0),
        (Fault.FLIPS_A_BYTE, State.DONE, 8 * BYTES - 1),
        (Fault.DROPS_A_DESCRIPTOR, State.DONE, 7 * BYTES),
    ],
)
def test_each_fault_does_what_it_says(fault, state, landed):
    transport, sender, receiver, peer = faulty({1: fault} if fault else {})
    moves = plan_moves(sender.geometry, receiver.geometry, RUNS)
    assert transport.read(peer, plan_moves(sender.geometry, receiver.geometry, [])).poll() is State.DONE
    transfer = transport.read(peer, moves)
    assert transfer.poll() is state
    assert (receiver.memory == 9).sum() == landed
    if state is State.ACTIVE:
        tries = [transfer.cancel() for _ in range(3 if fault is Fault.HANGS_HARD else 1)]
        assert tries == [False] * (len(tries) - 1) + [True]
        assert transfer.poll() is State.FAILED
        assert bool(receiver.memory.any()) == (fault is Fault.HANGS_HARD)


def test_half_of_a_single_descriptor_lands():
    transport, sender, receiver, peer = faulty({0: Fault.HALF_THEN_FAILS})
    moves = Moves(
        np.array([sender.geometry.base_address]), np.array([receiver.geometry.base_address]), np.array([101])
    )
    assert transport.read(peer, moves).poll() is State.FAILED
    assert (receiver.memory == 9).sum() == 50


def test_a_post_that_fails_writes_nothing():
    transport, sender, receiver, peer = faulty({0: Fault.POST_FAILS})
    with pytest.raises(TransferFailedError, match="scripted"):
        transport.read(peer, plan_moves(sender.geometry, receiver.geometry, RUNS))
    assert not receiver.memory.any()


def test_scripts_repeat_for_a_seed_and_hold_their_share():
    script = seeded_script(3, Fault, calls=4000, share=0.25)
    assert script == seeded_script(3, Fault, calls=4000, share=0.25)
    assert script != seeded_script(4, Fault, calls=4000, share=0.25)
    assert 800 < len(script) < 1200
    assert set(script.values()) == set(Fault)
