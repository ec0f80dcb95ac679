"""The receiver's thread: loads go in from one thread, each comes out once, idle it waits, closing ends it."""

from __future__ import annotations

import queue
import random
import threading
import time

import pytest
from two_engines import CONFIG, Pool, Site, record_of

from penstock.connectors import receiver_thread
from penstock.connectors.control import ControlClient, ControlServer
from penstock.connectors.digest import DramDigester
from penstock.connectors.errors import DigestMismatchError
from penstock.connectors.handoff import Address
from penstock.connectors.messages import Welcome
from penstock.connectors.receiver import Load, Outcome, Receiver
from penstock.connectors.receiver_thread import ReceiverDiedError, ReceiverThread
from penstock.connectors.runs import Run
from penstock.connectors.sender import Sender
from penstock.connectors.transports.faulty import Fault, FaultyTransport
from penstock.connectors.transports.loopback import LoopbackTransport

WAIT_S = 30.0


class Scripted:
    """A receiver that ends a load when the test says so."""

    def __init__(self) -> None:
        self.submitted: queue.Queue[Load] = queue.Queue()
        self.ready: queue.Queue[Load] = queue.Queue()
        self.pending = 0
        self.threads: set[int] = set()
        self.is_reading = False
        self.cancels_needed = 0

    @property
    def num_pending(self) -> int:
        return self.pending

    def submit(self, load: Load) -> None:
        self.threads.add(threading.get_ident())
        self.pending += 1
        self.submitted.put(load)

    def step(self, wait_s: float = 0.0) -> None:
        self.threads.add(threading.get_ident())

    def outcomes(self) -> list[Outcome]:
        ended = [Outcome(self.ready.get()) for _ in range(self.ready.qsize())]
        self.pending -= len(ended)
        return ended

    def close(self) -> int:
        self.cancels_needed = max(0, self.cancels_needed - 1)
        return self.cancels_needed


def load(site: Site, name: str) -> Load:
    return Load(name, site.prefill.prefill([hash(name)]), 0, (Run(0, 1),))


def collect(thread: ReceiverThread, count: int) -> list[Outcome]:
    """Wait for outcomes as the engine does: by asking at every step."""
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + WAIT_S
    while len(outcomes) < count:
        outcomes += thread.outcomes()
        assert time.monotonic() < deadline, f"{len(outcomes)} of {count} outcomes"
    return outcomes


def test_loads_run_on_one_thread_that_is_not_the_callers(site):
    receiver = Scripted()
    thread = ReceiverThread(receiver)
    loads = [load(site, f"r{i}") for i in range(20)]
    for one in loads:
        thread.submit(one)
    taken = [receiver.submitted.get(timeout=WAIT_S) for _ in loads]
    assert taken == loads
    assert thread.outcomes() == []
    for one in reversed(loads):
        receiver.ready.put(one)
    assert [o.load for o in collect(thread, 20)] == loads[::-1]
    assert thread.outcomes() == []
    thread.close()
    assert len(receiver.threads) == 1
    assert threading.get_ident() not in receiver.threads


@pytest.mark.parametrize("pending", [0, 3])
def test_closing_ends_the_thread_whether_idle_or_busy(site, pending):
    receiver = Scripted()
    thread = ReceiverThread(receiver)
    for i in range(pending):
        thread.submit(load(site, f"r{i}"))
        receiver.submitted.get(timeout=WAIT_S)
    assert thread.close()
    assert thread.close()
    assert not thread._thread.is_alive()


@pytest.mark.parametrize(("cancels_needed", "clean"), [(5, True), (1 << 60, False)])
def test_closing_waits_for_transfers_to_be_cancelled_but_not_for_ever(
    monkeypatch, caplog, cancels_needed, clean
):
    monkeypatch.setattr(receiver_thread, "CANCELLING_PAUSE_S", 0.0)
    if not clean:
        monkeypatch.setattr(receiver_thread, "CLOSING_S", 0.1)
    receiver = Scripted()
    receiver.cancels_needed = cancels_needed
    assert ReceiverThread(receiver).close() is clean
    assert ("cannot cancel" in caplog.text) is not clean


def test_closing_leaves_a_thread_that_does_not_end_as_it_is(site, monkeypatch, caplog):
    monkeypatch.setattr(receiver_thread, "CLOSING_S", 0.05)
    receiver, stuck, release = Scripted(), threading.Event(), threading.Event()

    def step(wait_s):
        stuck.set()
        release.wait(WAIT_S)

    receiver.step = step
    receiver.close = lambda: pytest.fail("closed while its thread uses it")
    thread = ReceiverThread(receiver)
    thread.submit(load(site, "r0"))
    assert stuck.wait(WAIT_S)
    assert not thread.close()
    assert "does not end" in caplog.text
    release.set()
    thread._thread.join(WAIT_S)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["submit", "step", "outcomes"])
def test_a_receiver_that_breaks_stops_the_engine_instead_of_letting_it_wait(site, method):
    defect = KeyError("a defect")

    def breaks(*args):
        raise defect

    receiver = Scripted()
    setattr(receiver, method, breaks)
    thread = ReceiverThread(receiver)
    thread.submit(load(site, "r0"))
    thread._thread.join(WAIT_S)
    assert not thread._thread.is_alive()
    for use in (thread.outcomes, lambda: thread.submit(load(site, "r1"))):
        with pytest.raises(ReceiverDiedError, match="will never end") as caught:
            use()
        assert caught.value.__cause__ is defect
    thread.close()


class Pair:
    """A real sender behind ZeroMQ and a real receiver on its thread, over loopback memory and real clocks."""

    BLOCKS = 64

    def __init__(self, key: str | None) -> None:
        self.network = {}
        self.source, self.target = (self._pool() for _ in range(2))
        self.server = ControlServer(("127.0.0.1", 0), key)
        self.sender = Sender("prefill", Address("127.0.0.1", self.server.port), CONFIG, time.monotonic)
        record = record_of(self.source, CONFIG)
        (geometry,) = self.source.geometries
        transport = LoopbackTransport("p", self.network)
        welcome = Welcome(
            self.sender.instance, record, geometry, transport.name, transport.register(geometry)
        )
        self.sender.open({0: welcome})
        self.server.start(self.sender.answer)
        self.transport = FaultyTransport(LoopbackTransport("d", self.network), {})
        (ours,) = self.target.geometries
        self.client = ControlClient(key, CONFIG.handshake_timeout_s)
        self.thread = ReceiverThread(
            Receiver(
                rank=0,
                record=record,
                geometry=ours,
                transport=self.transport,
                control=self.client,
                digester=DramDigester(ours),
                config=CONFIG,
                clock=time.monotonic,
            )
        )

    def _pool(self) -> Pool:
        return Pool(random.Random(1), self.BLOCKS, "BLHNC", 1)

    def load(self, name: str, run: Run, hashed: bool = True) -> Load:
        blocks = list(range(run.start, run.stop))
        for block in blocks:
            self.source.write(block, block)
        hand_off = self.sender.hand_off(
            name, [run], num_tokens=4 * run.length, prompt="0" * 32, block_size=4, ranks=1
        )
        if hashed:
            self.hash(name, blocks)
        return Load(name, hand_off, 0, (Run(self.BLOCKS - run.stop, run.length),))

    def hash(self, name: str, blocks: list[int]) -> None:
        (geometry,) = self.source.geometries
        self.sender.add_digests(name, 0, DramDigester(geometry).digests(blocks))

    def close(self) -> None:
        self.thread.close()
        self.server.close()


@pytest.fixture(params=[None, "secret"], ids=["open", "sealed"])
def pair(request):
    pair = Pair(request.param)
    yield pair
    pair.close()


def test_a_real_pair_moves_proves_and_reports(pair):
    loads = [pair.load(f"r{i}", Run(4 * i, 4)) for i in range(16)]
    for one in loads:
        pair.thread.submit(one)
    outcomes = collect(pair.thread, 16)
    assert [o.error for o in outcomes] == [None] * 16
    assert {o.load.request_id for o in outcomes} == {f"r{i}" for i in range(16)}
    for one in loads:
        (target,) = one.targets
        for i, block in enumerate(range(target.start, target.stop)):
            assert pair.target.holds(block, one.hand_off.runs[0].start + i)
    assert len(pair.sender.collect()) == 16


def test_a_real_pair_waits_for_late_digests_and_catches_a_flipped_byte(pair):
    pair.transport.script = {1: Fault.FLIPS_A_BYTE}
    late, flipped = pair.load("late", Run(0, 4), hashed=False), pair.load("flipped", Run(8, 4))
    pair.thread.submit(late)
    while pair.transport.reads < 1:
        assert not pair.thread.outcomes()
    pair.thread.submit(flipped)
    (first,) = collect(pair.thread, 1)
    assert first.load is flipped
    assert isinstance(first.error, DigestMismatchError)
    pair.hash("late", [0, 1, 2, 3])
    (second,) = collect(pair.thread, 1)
    assert (second.load, second.error) == (late, None)


@pytest.mark.parametrize("fault", [Fault.HANGS, Fault.HANGS_HARD])
def test_closing_cancels_what_moves_and_hangs_up(pair, fault):
    pair.transport.script = {0: fault}
    pair.thread.submit(pair.load("hangs", Run(0, 4)))
    while not pair.transport.reads:
        assert not pair.thread.outcomes()
    assert pair.thread.close()
    assert not pair.thread._receiver.is_reading
    assert pair.client._context.closed
    assert pair.thread.outcomes() == []
