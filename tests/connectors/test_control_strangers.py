"""Who may come in: garbage, floods, replays and keys on the control channel."""

from __future__ import annotations

import logging
import resource
import socket
import struct
import time
from contextlib import suppress

import pytest
import zmq
from control_kit import LEASE, LOCAL, answer, ask

from penstock.connectors import control
from penstock.connectors.envelope import Seal
from penstock.connectors.errors import PeerUnreachableError
from penstock.connectors.handoff import Address
from penstock.connectors.messages import (
    MAX_QUESTION_BYTES,
    EndOfRead,
    Release,
    Renew,
    Renewed,
    encode,
)


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
