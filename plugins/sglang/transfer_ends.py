"""The two ends of a transfer, put together from the cores: what prefill serves from, decode reads with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.connectors.control import ControlClient, ControlServer
from penstock.connectors.handoff import Address
from penstock.connectors.messages import Welcome
from penstock.connectors.receiver import Receiver
from penstock.connectors.receiver_thread import ReceiverThread
from penstock.connectors.sender import Sender
from penstock.connectors.transports.factory import make_transport
from penstock.plugins.sglang.incoming_rooms import IncomingRooms
from penstock.plugins.sglang.outgoing_rooms import RANK, OutgoingRooms

if TYPE_CHECKING:
    from penstock.connectors.compat import CompatibilityRecord
    from penstock.connectors.config import FlowKVConfig
    from penstock.connectors.digest import Digester
    from penstock.connectors.geometry import CacheGeometry
    from penstock.connectors.lease import Epochs
    from penstock.connectors.transports.base import Transport


@dataclass(frozen=True, slots=True)
class Cache:
    """One rank's KV cache: where it lies, what a peer must match, what hashes it, and under which name."""

    name: str
    geometry: CacheGeometry
    record: CompatibilityRecord
    digester: Digester
    epochs: Epochs | None
    page_size: int


class ServingEnd:
    """Answers decode ranks, which read this cache.

    Raises:
        FlowKVError: the control channel cannot listen, or the transport cannot be loaded.
    """

    def __init__(self, cache: Cache, config: FlowKVConfig) -> None:
        self._server = ControlServer(
            (config.host, config.port), config.shared_key, own_key=config.shared_key is None
        )
        address = Address(config.advertise_host or config.host, self._server.port, self._server.public_key)
        sender = Sender(cache.name, address, config, time.monotonic)
        if cache.epochs is not None:
            sender.use_epochs(cache.epochs)
        self._transport: Transport = make_transport(config, cache.name, reads=False)
        endpoint = self._transport.register(cache.geometry)
        welcome = Welcome(sender.instance, cache.record, cache.geometry, self._transport.name, endpoint)
        sender.open({RANK: welcome})
        self.rooms = OutgoingRooms(sender, cache.digester, config.digest, cache.page_size)
        self._server.start(sender.answer)

    def close(self) -> None:
        """Stop answering; the cache is no longer readable."""
        self._server.close()
        self._transport.close()


class ReadingEnd:
    """Reads from prefill ranks into this cache.

    Raises:
        FlowKVError: the transport cannot be loaded.
    """

    def __init__(self, cache: Cache, config: FlowKVConfig) -> None:
        self._transport: Transport = make_transport(config, cache.name, serves=False)
        self._transport.register(cache.geometry)
        self._reads = ReceiverThread(
            Receiver(
                rank=RANK,
                record=cache.record,
                geometry=cache.geometry,
                transport=self._transport,
                control=ControlClient(config.shared_key, config.handshake_timeout_s),
                digester=cache.digester,
                config=config,
                clock=time.monotonic,
            )
        )
        self.rooms = IncomingRooms(self._reads, cache.page_size, config.allowed_hosts)

    def close(self) -> None:
        """Stop reading; the memory stays registered while a read may still write to it."""
        if self._reads.close():
            self._transport.close()
