"""The control channel over real ZeroMQ on 127.0.0.1: a good client is served whatever the others do."""

from __future__ import annotations

import logging
import resource
import socket
import struct
import time
from contextlib import suppress

import msgspec
import pytest
import zmq
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

LOCAL = "127.0.0.1"
LEASE = "a" * 32


def answer(question):
    match question:
        case Renew(leases=leases):
            return Renewed(leases)
        case EndOfRead():
            return Confirmed(b"x" * 20_000)
        case Release(leases=leases):
            return Released(len(leases))
    raise AssertionError(question)


@pytest.fixture
def serve():
    """Starts servers on free ports and stops them."""
    servers = []

    def start(key=None, answer=answer, wall_clock=time.time, own_key=False):
        server = ControlServer((LOCAL, 0), key, wall_clock, own_key=own_key)
        servers.append(server)
        server.start(answer)
        return server, Address(LOCAL, server.port, server.public_key)

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def client_of():
    clients = []

    def make(key=None, timeout_s=30.0, **clocks):
        clients.append(ControlClient(key, timeout_s, **clocks))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def raw():
    """Plain ZeroMQ and TCP sockets of strangers, and of peers that know the key and do as they like."""
    context, plain = zmq.Context(), []

    def dealer(address, key=None, **options):
        stranger = context.socket(zmq.DEALER)
        if key:
            stranger.curve_serverkey, _ = server_keys(key)
            stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
        for name, value in options.items():
            stranger.setsockopt(getattr(zmq, name), value)
        stranger.connect(f"tcp://{address[0]}:{address[1]}")
        return stranger

    def tcp(address):
        plain.append(socket.create_connection(address[:2]))
        return plain[-1]

    def router():
        stranger = context.socket(zmq.ROUTER)
        return stranger, Address(LOCAL, stranger.bind_to_random_port(f"tcp://{LOCAL}"))

    yield type("Raw", (), {"dealer": dealer, "tcp": tcp, "router": router})
    for connection in plain:
        connection.close()
    context.destroy(linger=0)


def reply_to(client, ticket) -> Reply:
    """Wait for the reply to one question; the client's own time-out bounds the wait."""
    while True:
        for reply in client.poll(1.0):
            if reply.ticket == ticket:
                return reply


def ask(client, address, question):
    return reply_to(client, client.ask(address, question)).answer


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


def test_a_replayed_question_is_not_acted_on_twice(serve, client_of, raw):
    acted = []
    server, address = serve("secret", lambda q: acted.append(q) or answer(q))
    question, _ = Seal("secret", time.time).seal(encode(Release([LEASE])))
    stranger = raw.dealer(address, "secret")
    for _ in range(50):
        stranger.send(question)
    assert stranger.recv()
    assert ask(client_of("secret"), address, Renew([])) == Renewed([])
    while server.refused_messages < 49:
        assert ask(client_of("secret"), address, Renew([])) == Renewed([])
    assert acted.count(Release([LEASE])) == 1


@pytest.mark.parametrize("key", [None, "secret"])
def test_thousands_of_garbage_frames_cost_little_and_harm_nobody(serve, client_of, raw, caplog, key):
    caplog.set_level(logging.WARNING)
    server, address = serve(key)
    good, _ = Seal(None, time.time).seal(b"\x00garbage body")
    nested = b"\x96" + good[1:] + b"\x91" * 50_000
    frames = [b"", b"\xff" * 9, good, nested, good[:-1], encode(Renew([])), b"\xdd\xff\xff\xff\xff"]
    stranger = raw.dealer(address, key)
    for i in range(5000):
        stranger.send(frames[i % len(frames)])
        if i % 1000 == 0:
            assert ask(client_of(key), address, Renew([LEASE])) == Renewed([LEASE])
    client = client_of(key)
    while server.refused_messages < 5000:
        assert ask(client, address, Renew([LEASE])) == Renewed([LEASE])
    assert len(caplog.records) < 50, "the log grows with every bad frame"


def test_frames_above_the_limit_never_reach_the_parser(serve, client_of, raw):
    server, address = serve()
    stranger = raw.dealer(address)
    for _ in range(5):
        stranger.send(b"x" * (MAX_QUESTION_BYTES + 1000))
        assert ask(client_of(), address, Renew([])) == Renewed([])
    assert server.refused_messages == 0


def test_many_silent_connections_and_half_handshakes(serve, client_of, raw):
    _, address = serve()
    for i in range(200):
        connection = raw.tcp(address)
        connection.sendall(
            (b"", b"\xff", b"\xff" + b"\0" * 8 + b"\x7f\x03", b"GET / HTTP/1.1\r\n\r\n")[i % 4]
        )
    client = client_of()
    for _ in range(20):
        assert ask(client, address, Renew([LEASE])) == Renewed([LEASE])


def test_peers_that_never_read_lose_their_answers_and_nothing_else(serve, client_of, raw):
    """They are owed 120 MB; a queue of answers may not grow to that."""
    answered = []
    _, address = serve(None, lambda q: answered.append(1) or answer(q))
    before = resident_bytes()
    strangers = [raw.dealer(address, RCVHWM=1, RCVBUF=4096, SNDHWM=0) for _ in range(2)]
    for _ in range(3000):
        for stranger in strangers:
            question, _ = Seal(None, time.time).seal(encode(EndOfRead(LEASE, 0)))
            stranger.send(question)
    client = client_of()
    while len(answered) < 6000:
        assert ask(client, address, Renew([LEASE])) == Renewed([LEASE])
    assert resident_bytes() - before < 80 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_messages_of_several_parts_are_ignored(serve, client_of, raw):
    _, address = serve()
    question, _ = Seal(None, time.time).seal(encode(Renew([])))
    raw.dealer(address).send_multipart([question, question])
    assert ask(client_of(), address, Renew([])) == Renewed([])


GREETING = b"\xff" + b"\0" * 8 + b"\x7f"
"""Signature that opens a ZMTP connection of any version from 2.0 on."""
ENDLESS = b"\x03" + struct.pack(">Q", MAX_QUESTION_BYTES // 2) + b"x" * (MAX_QUESTION_BYTES // 2)
"""A part of a message, with more to come."""


def zmtp_3(mechanism: bytes) -> bytes:
    return GREETING + b"\x03\x00" + mechanism.ljust(20, b"\0") + b"\0" * 32


def command(body: bytes) -> bytes:
    return b"\x04" + bytes([len(body)]) + body


READY = command(b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER")


def parts_taken(connection, opening: bytes) -> bool:
    """Whether a server takes 64 MiB of parts after ``opening``, or hangs up."""
    try:
        connection.sendall(opening)
        for _ in range((64 << 20) // len(ENDLESS)):
            connection.sendall(ENDLESS)
    except ConnectionError:
        return False
    return True


@pytest.fixture
def recorded_hello(raw, client_of):
    """What a client that knows the key says first, as heard on the wire."""
    with socket.create_server((LOCAL, 0)) as listener:
        client_of("secret").ask(Address(LOCAL, listener.getsockname()[1]), Renew([]))
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            connection.sendall(zmtp_3(b"CURVE"))
            return stream.read(64 + 2 + 200)


@pytest.mark.parametrize(
    "opening",
    [
        zmtp_3(b"NULL") + READY,
        zmtp_3(b"CURVE"),
        zmtp_3(b"CURVE") + READY,
        zmtp_3(b"CURVE") + command(b"\x05HELLO\x01\x00" + b"\x01" * 193),
        GREETING + b"\x01\x05" + b"\0\0",
        b"\x01\0",
        "recorded",
    ],
    ids=["no CURVE", "no hello", "ready at once", "another key", "ZMTP 2.0", "ZMTP 1.0", "recorded hello"],
)
def test_an_endless_message_of_many_parts_is_cut_off(serve, client_of, raw, recorded_hello, opening):
    """Who speaks ZMTP by hand sends parts and never the last one; without the key nobody gets that far."""
    _, address = serve("secret")
    before = resident_bytes()
    assert not parts_taken(raw.tcp(address), recorded_hello if opening == "recorded" else opening)
    assert resident_bytes() - before < 16 << 20
    assert ask(client_of("secret"), address, Renew([LEASE])) == Renewed([LEASE])


@pytest.mark.parametrize("opening", ["no CURVE", "recorded hello"])
def test_without_a_shared_key_an_endless_message_is_cut_off_too(
    serve, client_of, raw, recorded_hello, opening
):
    """The server's own key is in the hand-offs, which a stranger has not seen."""
    _, address = serve(own_key=True)
    before = resident_bytes()
    first = recorded_hello if opening == "recorded hello" else zmtp_3(b"NULL") + READY
    assert not parts_taken(raw.tcp(address), first)
    assert resident_bytes() - before < 16 << 20
    assert ask(client_of(), address, Renew([LEASE])) == Renewed([LEASE])


def test_a_server_without_a_shared_key_answers_only_who_knows_its_own(serve, client_of):
    _, address = serve(own_key=True)
    other = zmq.curve_keypair()[0].decode()
    assert address.key is not None
    assert ask(client_of(), address, Renew([LEASE])) == Renewed([LEASE])
    for key in (None, other):
        stranger = client_of(None, 0.5)
        assert isinstance(ask(stranger, address._replace(key=key), Renew([LEASE])), PeerUnreachableError)
    assert ask(client_of(), address, Renew([LEASE])) == Renewed([LEASE])


def test_a_key_that_is_none_is_an_answer_not_a_crash(client_of):
    senseless = Address(LOCAL, 9, "#" * 40)
    assert isinstance(ask(client_of(), senseless, Renew([LEASE])), PeerUnreachableError)


def test_a_server_with_a_shared_key_makes_none_of_its_own(serve):
    server, _ = serve("secret", own_key=True)
    assert server.public_key is None


def test_a_handshake_that_stalls_is_ended(serve, raw, monkeypatch, recorded_hello):
    monkeypatch.setattr(control, "HANDSHAKE_MS", 50)
    _, address = serve("secret")
    for said in (b"", GREETING, zmtp_3(b"CURVE"), recorded_hello, recorded_hello + ENDLESS[:1000]):
        connection = raw.tcp(address)
        connection.settimeout(30.0)
        connection.sendall(said)
        with suppress(ConnectionResetError):
            while connection.recv(4096):
                pass


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
