"""The lease keeper's thread: what it says to senders, when, and that it ends."""

from __future__ import annotations

import queue
import time

import pytest
from two_engines import CONFIG, PREFILL, Clock, Site

from penstock.connectors.control import ControlClient, ControlServer, Reply
from penstock.connectors.errors import PeerUnreachableError
from penstock.connectors.handoff import Address, HandOff, parse_hand_off
from penstock.connectors.keeper import LeaseKeeper
from penstock.connectors.lease import LeaseEnd
from penstock.connectors.messages import MAX_LEASES, Release, Released, Renew, Renewed
from penstock.connectors.runs import Run
from penstock.connectors.sender import Sender

WAIT_S = 30.0
"""Longest wait for the thread; only a failing test reaches it."""


class Recorder:
    """A control client that writes down what is asked and answers as told."""

    def __init__(self) -> None:
        self.asked: queue.Queue = queue.Queue()
        self.replies: queue.Queue[Reply] = queue.Queue()
        self.closed_with: float | None = None

    def ask(self, address, question) -> int:
        self.asked.put((address, question))
        return 0

    def poll(self, wait_s: float = 0.0) -> list[Reply]:
        return [self.replies.get() for _ in range(self.replies.qsize())]

    def close(self, linger_s: float = 0.0) -> None:
        self.closed_with = linger_s

    def next(self):
        return self.asked.get(timeout=WAIT_S)

    def rest(self) -> list:
        return [self.asked.get() for _ in range(self.asked.qsize())]


def hand_off_of(lease: int, port: int = PREFILL[1], host: str = PREFILL[0]) -> HandOff:
    hand_off = Site().prefill.prefill([1])
    return parse_hand_off(
        {**hand_off.to_params(), "remote_lease": f"{lease:032x}", "remote_port": port, "remote_host": host}
    )


@pytest.fixture
def client() -> Recorder:
    return Recorder()


@pytest.fixture
def keeper_of(client):
    """Makes keepers that are closed at the end; an hour between heartbeats unless a test asks for them."""
    keepers = []

    def make(heartbeat_s=3600.0, client=client):
        keepers.append(LeaseKeeper(client, heartbeat_s, time.monotonic))
        return keepers[-1]

    yield make
    for keeper in keepers:
        keeper.close()


def test_a_lease_is_renewed_at_once_and_then_at_every_heartbeat(client, keeper_of):
    keeper = keeper_of(heartbeat_s=0.001)
    hand_off = hand_off_of(1)
    keeper.watch(hand_off)
    for _ in range(4):
        assert client.next() == (PREFILL, Renew([hand_off.remote_lease]))


def test_each_sender_is_asked_about_its_own_leases(client, keeper_of):
    keeper = keeper_of()
    for lease, port in [(1, 5600), (2, 5601)]:
        keeper.watch(hand_off_of(lease, port))
    keeper.close()
    for address, question in client.rest():
        assert question.leases == [f"{address[1] - 5599:032x}"]


def test_what_is_unwatched_or_released_is_not_renewed(client, keeper_of):
    keeper = keeper_of(heartbeat_s=0.001)
    read, given_up, kept = (hand_off_of(i) for i in (1, 2, 3))
    for hand_off in (read, given_up, kept):
        keeper.watch(hand_off)
    keeper.unwatch(read)
    keeper.release(given_up, "client gone")
    while (said := client.next()) != (PREFILL, Release([given_up.remote_lease], "client gone")):
        assert isinstance(said[1], Renew)
    for _ in range(3):
        assert client.next() == (PREFILL, Renew([kept.remote_lease]))


def test_f25_closing_releases_what_is_still_watched_and_gives_it_time_to_leave(client, keeper_of):
    keeper = keeper_of()
    keeper.watch(hand_off_of(1, 5600))
    keeper.watch(hand_off_of(2, 5600))
    keeper.watch(hand_off_of(3, 5601))
    keeper.release(hand_off_of(2, 5600), "no longer wanted")
    keeper.close()
    released = {
        (address[1], lease)
        for address, question in client.rest()
        if isinstance(question, Release)
        for lease in question.leases
    }
    assert released == {(5600, f"{1:032x}"), (5600, f"{2:032x}"), (5601, f"{3:032x}")}
    assert client.closed_with == LeaseKeeper.FLUSH_S
    keeper.close()


def test_f25_at_a_real_sender_the_blocks_are_free_before_the_decode_server_has_gone():
    server = ControlServer(("127.0.0.1", 0), "secret")
    sender = Sender("prefill", Address("127.0.0.1", server.port), CONFIG, Clock())
    ended = queue.Queue()

    def answer(question):
        reply = sender.answer(question)
        for end in sender.collect():
            ended.put(end)
        return reply

    server.start(answer)
    keeper = LeaseKeeper(ControlClient("secret", 10.0), 3600.0, time.monotonic)
    for i in range(20):
        keeper.watch(
            sender.hand_off(f"r{i}", [Run(i, 1)], num_tokens=4, prompt="0" * 32, block_size=4, ranks=1)
        )
    keeper.close()
    ends = [ended.get(timeout=WAIT_S) for _ in range(20)]
    assert {end.end for end in ends} == {LeaseEnd.RELEASED}
    assert len({end.request_id for end in ends}) == 20
    server.close()


def test_a_lost_lease_is_known_until_it_is_dropped(client, keeper_of):
    keeper = keeper_of(heartbeat_s=0.001)
    hand_off = hand_off_of(1)
    keeper.watch(hand_off)
    assert not keeper.is_lost(hand_off)
    client.replies.put(Reply(1, Renewed([hand_off.remote_lease])))
    while not keeper.is_lost(hand_off):
        client.next()
    keeper.unwatch(hand_off)
    keeper.close()
    assert not keeper.is_lost(hand_off)


def test_a_lost_lease_is_known_without_waiting_for_the_next_heartbeat(client, keeper_of):
    """A request that queues with a lost lease is recomputed at once instead of pulling in vain."""
    keeper = keeper_of(heartbeat_s=3600.0)
    hand_off = hand_off_of(1)
    keeper.watch(hand_off)
    client.next()
    client.replies.put(Reply(1, Renewed([hand_off.remote_lease])))
    deadline = time.monotonic() + WAIT_S
    while not keeper.is_lost(hand_off):
        assert time.monotonic() < deadline


def test_what_a_sender_says_about_leases_that_nobody_watches_is_not_kept(client, keeper_of):
    """A renewal overtaken by the end of its request is answered with a lost lease that is history."""
    keeper = keeper_of(heartbeat_s=0.001)
    keeper.watch(hand_off_of(1))
    client.replies.put(Reply(1, Renewed([f"{i:032x}" for i in range(2, 1000)])))
    while client.replies.qsize():
        client.next()
    keeper.close()
    assert not keeper._lost


def test_a_burst_of_requests_costs_one_renewal_each_not_one_of_all_for_each(client, keeper_of):
    keeper = keeper_of()
    hand_offs = [hand_off_of(i) for i in range(1, 201)]
    for hand_off in hand_offs:
        keeper.watch(hand_off)
    keeper.close()
    renewed = [
        lease for _, question in client.rest() if isinstance(question, Renew) for lease in question.leases
    ]
    assert set(renewed) == {h.remote_lease for h in hand_offs}
    assert len(renewed) <= 2 * len(hand_offs)


def test_more_leases_than_a_message_holds_are_split(client, keeper_of):
    keeper = keeper_of(heartbeat_s=3600.0)
    prototype = hand_off_of(1)
    params = prototype.to_params()
    leases = {f"{i:032x}" for i in range(MAX_LEASES + 10)}
    for lease in leases:
        keeper.watch(parse_hand_off({**params, "remote_lease": lease}))
    keeper.close()
    released = [q.leases for _, q in client.rest() if isinstance(q, Release)]
    assert sorted(map(len, released)) == [10, MAX_LEASES]
    assert {lease for part in released for lease in part} == leases


def test_senders_that_are_gone_or_talk_nonsense_do_not_end_the_thread(client, keeper_of):
    keeper = keeper_of(heartbeat_s=0.001)
    keeper.watch(hand_off_of(1))
    client.replies.put(Reply(1, PeerUnreachableError("gone")))
    client.replies.put(Reply(2, Released(3)))
    while client.replies.qsize():
        client.next()
    client.rest()
    assert client.next()[1] == Renew([f"{1:032x}"])


def test_idle_the_thread_asks_nothing_and_still_closes(client, keeper_of):
    keeper = keeper_of(heartbeat_s=0.001)
    keeper.unwatch(hand_off_of(1))
    keeper.close()
    assert client.rest() == []


def test_a_name_that_nobody_knows_costs_only_its_own_request():
    keeper = LeaseKeeper(ControlClient(None, 1.0), 0.001, time.monotonic)
    keeper.watch(hand_off_of(1, host="-"))
    keeper.watch(hand_off_of(2, host=".."))
    keeper.close()
    assert not keeper._thread.is_alive()
