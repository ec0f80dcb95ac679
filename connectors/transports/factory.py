"""Byte movers by name."""

from __future__ import annotations

import secrets

from penstock.connectors.config import FlowKVConfig
from penstock.connectors.errors import FlowKVError
from penstock.connectors.transports.base import Transport
from penstock.connectors.transports.loopback import LoopbackTransport
from penstock.connectors.transports.nixl import NixlTransport
from penstock.connectors.transports.striped import StripedTransport

NAMES = ("nixl", "loopback")


def make_transport(config: FlowKVConfig, owner: str, *, serves: bool = True, reads: bool = True) -> Transport:
    """The configured byte mover, under a name that no restarted process shares.

    Args:
        owner: the engine and rank that the mover is of.
        serves: whether peers read from it.
        reads: whether it reads from peers, and so may need several lanes.

    Raises:
        FlowKVError: the name is unknown, or the transport cannot be loaded.
    """
    name = f"{owner}-{secrets.token_hex(4)}"
    first = _lane(config, name, serves=serves)
    if not reads or config.lanes == 1:
        return first
    return StripedTransport(
        [first, *(_lane(config, f"{name}-{lane}", serves=False) for lane in range(1, config.lanes))]
    )


def _lane(config: FlowKVConfig, name: str, *, serves: bool) -> Transport:
    match config.transport:
        case "nixl":
            return NixlTransport(name, config.nixl_backends, serves=serves)
        case "loopback":
            return LoopbackTransport(name)
        case other:
            raise FlowKVError(f"transport is {other!r}; allowed: {', '.join(NAMES)}")
