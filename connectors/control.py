"""The control channel: sealed messages over ZeroMQ, a ROUTER at the sender, DEALERs at the receivers.

The server binds to exactly the address that it is given. Frames above the size limit never leave libzmq,
its queues are bounded, and a peer that does not read its answers loses them, not the server.

Connections are encrypted with CURVE. With a shared key the server's key pair follows from it; without one,
each server makes its own, whose public half travels in the hand-offs. A peer that does not know it fails at
its first frame of the handshake. In clear, which is left for a libzmq without CURVE, whoever reaches the port
can fill the memory: libzmq limits the size of a part of a message but not the number of parts.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from penstock.connectors.envelope import WINDOW_S, Seal
from penstock.connectors.errors import FlowKVError, MessageError, PeerUnreachableError
from penstock.connectors.handoff import Address
from penstock.connectors.messages import (
    MAX_ANSWER_BYTES,
    MAX_QUESTION_BYTES,
    Answer,
    Question,
    Refused,
    decode_answer,
    decode_question,
    encode,
)

logger = logging.getLogger(__name__)

FRAME_OVERHEAD_BYTES = 256
QUEUE = 1000
UNREAD_QUESTIONS = 100
"""Questions of one connection that wait in memory; a peer that asks more waits in TCP."""
KEPT_CONNECTIONS = 256
"""Connections that a client keeps open; beyond, the oldest from which no answer is awaited are dropped."""
HANDSHAKE_MS = 10_000
"""Time that a new connection has for the CURVE handshake."""


def _url(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def has_curve() -> bool:
    """Whether the installed libzmq can encrypt."""
    return bool(zmq.has("curve"))


def server_keys(shared_key: str) -> tuple[bytes, bytes]:
    """The control server's public and secret CURVE keys in Z85; who knows the shared key knows both.

    Raises:
        FlowKVError: the installed libzmq has no CURVE.
    """
    if not has_curve():
        raise FlowKVError(
            f"shared_key needs a libzmq that has CURVE; the installed libzmq {zmq.zmq_version()} has not"
        )
    secret = z85.encode(hmac.digest(shared_key.encode(), b"penstock flowkv control server", "sha256"))
    return zmq.curve_public(secret), secret


class ControlServer:
    """Listens at once, answers on one thread from ``start`` until ``close``.

    Args:
        bind: host and port to listen on; port 0 takes a free one.
        shared_key: secret that peers must know to connect and to sign questions with, or None.
        own_key: without a shared key, make a key pair for this server alone; peers need ``public_key`` then.

    Raises:
        FlowKVError: the address cannot be bound, or there is a key and libzmq has no CURVE.
    """

    def __init__(
        self,
        bind: tuple[str, int],
        shared_key: str | None,
        wall_clock: Callable[[], float] = time.time,
        *,
        own_key: bool = False,
    ) -> None:
        secret = server_keys(shared_key)[1] if shared_key else None
        self.public_key: str | None = None
        """What hand-offs must say; None where both sides know it by the shared key, or speak in clear."""
        if own_key and not secret and has_curve():
            public, secret = zmq.curve_keypair()
            self.public_key = public.decode()
        self._seal = Seal(shared_key, wall_clock)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, ":" in bind[0])
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_QUESTION_BYTES + FRAME_OVERHEAD_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE)
        self._socket.setsockopt(zmq.RCVHWM, UNREAD_QUESTIONS)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        if secret:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        try:
            self._socket.bind(_url(*bind))
        except zmq.ZMQError as error:
            self._context.destroy()
            raise FlowKVError(
                f"FlowKV cannot bind its control channel to {bind[0]}:{bind[1]}: {error}"
            ) from error
        host, port = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://").rsplit(":", 1)
        self.port = int(port)
        if not secret and not ipaddress.ip_address(host.strip("[]")).is_loopback:
            logger.warning(
                "FlowKV's control channel on %s:%s trusts whoever reaches it: set shared_key", host, port
            )
        self.refused_messages = 0
        self._wake, self._stop = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://stop")
        self._stop.connect("inproc://stop")
        self._thread: threading.Thread | None = None

    def start(self, answer: Callable[[Question], Answer]) -> None:
        """Answer from now on; ``answer`` is called for each authentic question, on the server's thread."""
        assert self._thread is None
        self._answer = answer
        self._thread = threading.Thread(target=self._serve, name="flowkv-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port."""
        if self._thread is not None and not self._context.closed:
            self._wake.send(b"", zmq.NOBLOCK)
            self._thread.join()
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._stop, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        while self._stop not in dict(poller.poll()):
            parts = self._socket.recv_multipart()
            if len(parts) == 2:
                self._reply(*parts)

    def _reply(self, peer: bytes, data: bytes) -> None:
        try:
            frame = self._seal.open_question(data)
        except MessageError as error:
            self._refuse(error)
            return
        try:
            answer = self._answer(decode_question(frame.body))
        except MessageError as error:
            self._refuse(error)
            answer = Refused(str(error)[:1024])
        sealed, _ = self._seal.seal(encode(answer), answers=frame.nonce)
        try:
            self._socket.send_multipart([peer, sealed], zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("FlowKV dropped an answer to a peer that does not read")

    def _refuse(self, error: MessageError) -> None:
        """Count; log the first, the second, the fourth, the eighth ..."""
        self.refused_messages += 1
        if self.refused_messages.bit_count() == 1:
            logger.warning("FlowKV refused a control message (%d so far): %s", self.refused_messages, error)


@dataclass(slots=True, frozen=True)
class Reply:
    """Outcome of one question: an answer, or the reason why there is none."""

    ticket: int
    answer: Answer | FlowKVError


@dataclass(slots=True, frozen=True)
class _Asked:
    ticket: int
    address: Address
    deadline: float


class ControlClient:
    """Asks any number of senders without blocking. One thread at a time.

    Args:
        shared_key: secret to connect and to sign with, or None.
        timeout_s: how long to wait for an answer.
        clock: monotonic seconds.

    Raises:
        FlowKVError: there is a key and libzmq has no CURVE.
    """

    def __init__(
        self,
        shared_key: str | None,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._server_key = server_keys(shared_key)[0] if shared_key else None
        self._keys = zmq.curve_keypair() if has_curve() else None
        self._seal = Seal(shared_key, wall_clock)
        self._timeout_s = timeout_s
        self._clock = clock
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets: dict[Address, zmq.Socket[bytes]] = {}
        self._asked: dict[bytes, _Asked] = {}
        self._failed: list[Reply] = []
        self._next_ticket = 0

    def ask(self, address: Address, question: Question) -> int:
        """Send a question; its :class:`Reply` carries the ticket returned."""
        self._next_ticket += 1
        ticket = self._next_ticket
        sealed, nonce = self._seal.seal(encode(question))
        try:
            self._socket(address).send(sealed, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # libzmq gives a connection up for good when the two ends do not agree on CURVE.
            hint = "; it does not read, or its shared_key differs" if isinstance(error, zmq.Again) else ""
            reason = f"{address.host}:{address.port}: {error}{hint}"
            self._failed.append(Reply(ticket, PeerUnreachableError(reason)))
            self.forget(address)
        else:
            self._asked[nonce] = _Asked(ticket, address, self._clock() + self._timeout_s)
        return ticket

    def poll(self, wait_s: float = 0.0) -> list[Reply]:
        """Replies that have come, and questions whose time has run out; waits up to ``wait_s`` for one."""
        replies, self._failed = self._failed, []
        for socket, _ in self._poller.poll(0 if replies else int(wait_s * 1000)):
            replies += self._receive(socket)
        now = self._clock()
        for nonce, asked in [(n, a) for n, a in self._asked.items() if now >= a.deadline]:
            del self._asked[nonce]
            where = f"{asked.address.host}:{asked.address.port}"
            reason = (
                f"no answer from {where} within {self._timeout_s:g} s: it is down, "
                f"its shared_key differs, or its clock is more than {WINDOW_S:g} s off"
            )
            replies.append(Reply(asked.ticket, PeerUnreachableError(reason)))
            self.forget(asked.address)
        return replies

    def forget(self, address: Address) -> None:
        """Drop the connection to a sender unless an answer of it is awaited."""
        if any(asked.address == address for asked in self._asked.values()):
            return
        if socket := self._sockets.pop(address, None):
            self._poller.unregister(socket)
            socket.close(0)

    def close(self, linger_s: float = 0.0) -> None:
        """Drop all connections; what was asked still leaves within ``linger_s``, answers are forgotten."""
        self._sockets.clear()
        self._context.destroy(linger=int(linger_s * 1000))

    def _socket(self, address: Address) -> zmq.Socket[bytes]:
        if address not in self._sockets:
            for old in list(self._sockets)[: max(0, len(self._sockets) + 1 - KEPT_CONNECTIONS)]:
                self.forget(old)
            socket = self._context.socket(zmq.DEALER)
            try:
                self._connect(socket, address)
            except zmq.ZMQError:
                socket.close(0)
                raise
            self._sockets[address] = socket
            self._poller.register(socket, zmq.POLLIN)
        return self._sockets[address]

    def _connect(self, socket: zmq.Socket[bytes], address: Address) -> None:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, ":" in address.host)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES + FRAME_OVERHEAD_BYTES)
        socket.set_hwm(QUEUE)
        server_key = self._server_key or (address.key.encode() if address.key else None)
        if server_key and self._keys:
            socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys[0])
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys[1])
        socket.connect(_url(address.host, address.port))

    def _receive(self, socket: zmq.Socket[bytes]) -> list[Reply]:
        """What has come, at most a queue full, so that a peer that floods cannot hold the caller."""
        replies: list[Reply] = []
        for _ in range(QUEUE):
            try:
                data = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                frame = self._seal.open_answer(data)
            except MessageError as error:
                logger.warning("FlowKV refused an answer: %s", error)
                continue
            if asked := self._asked.pop(frame.answers, None):
                replies.append(Reply(asked.ticket, self._parsed(frame.body)))
        return replies

    @staticmethod
    def _parsed(body: bytes) -> Answer | FlowKVError:
        try:
            return decode_answer(body)
        except MessageError as error:
            return error
