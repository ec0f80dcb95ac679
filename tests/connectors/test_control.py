"""The control channel over real ZeroMQ on 127.0.0.1: a good client is served whatever the others do."""

from __future__ import annotations

import logging
import socket
import time

import msgspec
import pytest
import zmq
from control_kit import LEASE, LOCAL, answer, ask, reply_to
from two_engines import Clock

from penstock.connectors import control
from penstock.connectors.control import ControlClient, ControlServer, Reply, server_keys
from penstock.connectors.envelope import Seal
from penstock.connectors.errors import FlowKVError, MessageError, PeerUnreachableError
from penstock.connectors.handoff import Address
from penstock.connectors.messages import (
    MAX_QUESTION_BYTES,
    Confirmed,
    EndOfRead,
    Refused,
    Release,
    Released,
    Renew,
    Renewed,
    encode,
)


@pytest.mark.parametrize("key", [None, "secret"])
def test_every_question_gets_its_own_answer(serve, client_of, key):
    (_, one), (_, two) = serve(key), serve(key)
    client = client_of(key)
    tickets = {client.ask((one, two)[i % 2], Release([f"{i:032x}"] * i)): i for i in range(200)}
    while tickets:
        for reply in client.poll(1.0):
            assert reply.answer == Released(tickets.pop(reply.ticket))


@pytest.mark.parametrize(("ours", "theirs"), [(None, "secret"), ("secret", None), ("secret", "Secret")])
def test_another_key_gets_no_answer_and_the_reason_says_what_to_look_at(serve, client_of, ours, theirs):
    _, address = serve(theirs)
    clock = Clock()
    client = client_of(ours, timeout_s=10.0, clock=clock)
    ticket = client.ask(address, Renew([]))
    assert client.poll(0.2) == []
    clock.advance(10.0)
    (reply,) = client.poll()
    assert reply.ticket == ticket
    assert isinstance(reply.answer, PeerUnreachableError)
    assert f"{LOCAL}:{address[1]} within 10 s" in str(reply.answer)
    assert "shared_key" in str(reply.answer)


def test_the_largest_question_and_answer_fit_into_an_encrypted_message(serve, client_of, raw, monkeypatch):
    largest = 1 << 20
    monkeypatch.setattr(control, "MAX_ANSWER_BYTES", largest)
    frame = len(encode(Confirmed(b"x" * largest))) - largest
    digests = b"x" * (largest - frame)
    _, address = serve("secret", lambda question: Confirmed(digests))
    assert ask(client_of("secret"), address, EndOfRead(LEASE, 0)) == Confirmed(digests)
    seal = Seal("secret", time.time)
    question, nonce = seal.seal(b"x" * MAX_QUESTION_BYTES)
    peer = raw.dealer(address, "secret")
    peer.send(question)
    assert seal.open_answer(peer.recv()).answers == nonce


@pytest.mark.parametrize("keys", [("secret", None), (None, "secret")], ids=["key lost", "key set"])
def test_a_server_whose_key_was_wrong_for_a_while_is_reached_again(serve, client_of, keys):
    """The two ends disagree on CURVE, so that libzmq gives the connection up."""
    ours, theirs = keys
    server, address = serve(ours)
    client = client_of(ours)
    assert ask(client, address, Renew([])) == Renewed([])
    server.close()
    wrong = ControlServer(address[:2], theirs)
    wrong.start(answer)
    while client._sockets[address].poll(10, zmq.POLLOUT):
        pass
    assert "its shared_key differs" in str(ask(client, address, Renew([])))
    wrong.close()
    again = ControlServer(address[:2], ours)
    again.start(answer)
    assert ask(client, address, Renew([LEASE])) == Renewed([LEASE])
    again.close()


def test_a_key_without_curve_in_libzmq_stops_start_up(monkeypatch):
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    with pytest.raises(FlowKVError, match="shared_key needs a libzmq that has CURVE"):
        ControlServer((LOCAL, 0), "secret")
    with pytest.raises(FlowKVError, match="shared_key needs a libzmq that has CURVE"):
        ControlClient("secret", 1.0)
    ControlServer((LOCAL, 0), None).close()
    ControlClient(None, 1.0).close()


def test_the_keys_of_the_server_follow_from_the_shared_key_alone():
    """Both roles derive them, on hosts that may run different releases."""
    assert server_keys("secret") == (
        b"2!@XGfz@WKNrL<XZ<ehmhp@S4b[FQClHvZOdD)9j",
        b"6z/mrjanlGB1&>qZd[nGtlaT(f)8]Z7Pg21S!zpi",
    )
    assert server_keys("secret")[0] != server_keys("Secret")[0]


@pytest.mark.parametrize(
    ("host", "key", "warnings"),
    [("0.0.0.0", None, 1), ("0.0.0.0", "secret", 0), (LOCAL, None, 0), ("localhost", None, 0)],
)
def test_a_server_that_trusts_everybody_says_so_once(caplog, host, key, warnings):
    caplog.set_level(logging.WARNING)
    ControlServer((host, 0), key).close()
    assert [("set shared_key" in record.message) for record in caplog.records] == [True] * warnings


def test_an_authentic_question_that_makes_no_sense_is_answered_with_the_reason(serve, raw):
    _, address = serve("secret")
    seal = Seal("secret", time.time)
    question, nonce = seal.seal(b"\x81\xa4type\xa4what")
    stranger = raw.dealer(address, "secret")
    stranger.send(question)
    frame = seal.open_answer(stranger.recv())
    assert frame.answers == nonce
    assert "Invalid value 'what'" in msgspec.msgpack.decode(frame.body, type=Refused).reason


class Imposter:
    """A sender that answers as a test tells it to."""

    def __init__(self, raw, client) -> None:
        self.socket, self.address = raw.router()
        self.client, self.seal = client, Seal(None, time.time)

    def hear(self, question) -> tuple[int, bytes, bytes]:
        ticket = self.client.ask(self.address, question)
        peer, data = self.socket.recv_multipart()
        return ticket, peer, self.seal.open_question(data).nonce

    def say(self, peer: bytes, nonce: bytes, body: bytes) -> None:
        self.socket.send_multipart([peer, self.seal.seal(body, answers=nonce)[0]])


def test_answers_that_nobody_asked_for_are_ignored(client_of, raw):
    imposter = Imposter(raw, client_of())
    ticket, peer, nonce = imposter.hear(Renew([]))
    for other in (b"n" * 16, nonce[::-1]):
        imposter.say(peer, other, encode(Renewed([LEASE])))
    imposter.socket.send_multipart([peer, b"garbage"])
    imposter.say(peer, nonce, encode(Renewed([])))
    imposter.say(peer, nonce, encode(Renewed([LEASE])))
    assert reply_to(imposter.client, ticket).answer == Renewed([])
    second, peer, nonce = imposter.hear(Renew([]))
    imposter.say(peer, nonce, encode(Renewed(["b" * 32])))
    assert imposter.client.poll(5.0) == [Reply(second, Renewed(["b" * 32]))]


def test_an_answer_that_cannot_be_parsed_ends_the_wait(client_of, raw):
    """The question is answered, if badly: whoever asked must hear of it and not wait for ever."""
    imposter = Imposter(raw, client_of())
    ticket, peer, nonce = imposter.hear(Renew([]))
    imposter.say(peer, nonce, b"\x81\xa4type\xa4what")
    assert isinstance(reply_to(imposter.client, ticket).answer, MessageError)


def test_a_flood_of_answers_does_not_hold_the_caller(client_of):
    class Flood:
        received = 0

        def recv(self, flags):
            self.received += 1
            assert self.received < 100_000, "the client reads for as long as the peer sends"
            return b"garbage"

    assert client_of()._receive(Flood()) == []


def test_time_outs_follow_the_clock_and_drop_the_connection(client_of, raw):
    clock = Clock()
    client = client_of(timeout_s=10.0, clock=clock)
    _, address = raw.router()
    first = client.ask(address, Renew([]))
    clock.advance(6.0)
    second = client.ask(address, Renew([]))
    assert client.poll() == []
    clock.advance(4.0)
    assert [reply.ticket for reply in client.poll()] == [first]
    assert address in client._sockets
    clock.advance(6.0)
    assert [reply.ticket for reply in client.poll()] == [second]
    assert address not in client._sockets


def test_a_server_that_comes_back_at_its_address_is_reached_again(serve, client_of):
    server, address = serve()
    client = client_of()
    assert ask(client, address, Renew([])) == Renewed([])
    server.close()
    ticket = client.ask(address, Renew([LEASE]))
    again = ControlServer(address[:2], None)
    again.start(answer)
    assert reply_to(client, ticket).answer == Renewed([LEASE])
    again.close()


def test_connections_to_servers_long_gone_are_dropped(serve, client_of, monkeypatch):
    monkeypatch.setattr(control, "KEPT_CONNECTIONS", 6)
    client = client_of()
    addresses = [serve()[1] for _ in range(9)]
    for turn, address in enumerate(addresses * 2):
        assert ask(client, address, Renew([])) == Renewed([])
        assert len(client._sockets) == min(turn + 1, 6)


@pytest.mark.parametrize("host", ["..", ":", "-", ":::::", "1.2.3.4:5", "::1%lo"])
def test_a_host_that_cannot_be_connected_is_a_reply_not_an_exception(client_of, host):
    clock = Clock()
    client = client_of(timeout_s=1.0, clock=clock)
    ticket = client.ask(Address(host, 5600), Renew([]))
    clock.advance(1.0)
    (reply,) = client.poll()
    assert reply.ticket == ticket
    assert isinstance(reply.answer, PeerUnreachableError)


def test_a_taken_port_is_named(serve):
    _, address = serve()
    with pytest.raises(FlowKVError, match=rf"bind its control channel to 127.0.0.1:{address[1]}.*in use"):
        ControlServer(address[:2], None)


def test_the_server_listens_on_its_address_only(serve):
    _, address = serve()
    with socket.socket() as other:
        other.bind(("127.0.0.2", address.port))


def test_closing_is_quick_in_every_state():
    never_started = ControlServer((LOCAL, 0), None)
    never_started.close()
    never_started.close()
    started = ControlServer((LOCAL, 0), None)
    started.start(answer)
    started.close()
    started.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_closing_returns_after_the_thread_has_died():
    def breaks(question):
        raise KeyError("a defect of the caller")

    server = ControlServer((LOCAL, 0), None)
    server.start(breaks)
    client = ControlClient(None, 5.0)
    client.ask(Address(LOCAL, server.port), Renew([]))
    server._thread.join(10.0)
    client.close()
    server.close()


def test_releases_leave_before_the_client_is_gone(serve):
    """F25: what is asked just before closing still arrives."""
    heard = []
    server, address = serve("secret", lambda q: heard.append(q) or answer(q))
    client = ControlClient("secret", 5.0)
    for i in range(50):
        client.ask(address, Release([f"{i:032x}"], "shutting down"))
    client.close(linger_s=5.0)
    other = ControlClient("secret", 5.0)
    while len(heard) < 50:
        assert ask(other, address, Renew([])) == Renewed([])
        heard[:] = [q for q in heard if isinstance(q, Release)]
    other.close()
    assert server.refused_messages == 0
