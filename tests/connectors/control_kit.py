"""Servers, clients and strangers for the tests of the control channel, over real ZeroMQ on 127.0.0.1."""

from __future__ import annotations

import socket
import time

import pytest
import zmq

from penstock.connectors.control import ControlClient, ControlServer, Reply, server_keys
from penstock.connectors.handoff import Address
from penstock.connectors.messages import Confirmed, EndOfRead, Release, Released, Renew, Renewed

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
