"""Byte movers: the contract of a transport, on loopback and real NIXL over DRAM, and the fault kit itself."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from penstock.connectors.config import FlowKVConfig
from penstock.connectors.errors import FlowKVError, TransferFailedError
from penstock.connectors.geometry import CacheGeometry, Moves, Strip, plan_moves
from penstock.connectors.runs import JointRun
from penstock.connectors.transports.base import State, Transfer, Transport
from penstock.connectors.transports.factory import make_transport
from penstock.connectors.transports.faulty import Fault, FaultyTransport, seeded_script
from penstock.connectors.transports.loopback import LoopbackTransport

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
