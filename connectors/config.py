"""FlowKV's configuration: one frozen struct, the same keys in every engine."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

DigestMode = Literal["off", "sampled", "full"]
Policy = Literal["runs", "stock"]
TransportName = Literal["nixl", "loopback"]

ANY_ADDRESS = ("0.0.0.0", "::", "*")
Host = Annotated[str, msgspec.Meta(min_length=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class FlowKVConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All knobs of FlowKV. Nothing below this struct reads an environment variable.

    Every duration is in seconds, every size in bytes unless the name says otherwise.
    """

    host: Host = "127.0.0.1"
    """Address that the control channel binds to, and that peers are told unless ``advertise_host`` is set."""
    port: Port = 0
    """TCP port of the control channel; 0 lets the system choose a free one."""
    advertise_host: Host | None = None
    """Address that peers use to reach this control channel, where it differs from ``host``."""
    shared_key: str | None = None
    """Secret that both roles hold; with it, unsigned, altered or replayed control messages are refused."""
    allowed_hosts: tuple[Host, ...] = ()
    """Prefill hosts that a decode server may be told to pull from; empty allows any IP address, no name."""
    pickup_s: Seconds = 60.0
    """How long a prefill server keeps a handed-off request's blocks for the decode side's first sign of life.

    Answers and requests queue in front of two busy servers meanwhile, so it is longer than ``lease_s``.
    """
    lease_s: Seconds = 30.0
    """How long a prefill server keeps a request's blocks after the last sign of life from the decode side."""
    longest_lease_s: Seconds = 600.0
    """Bound on a lease's life, however often the decode side renews it."""
    heartbeat_s: Seconds = 5.0
    """Interval at which a decode server renews the leases that it waits on."""
    handshake_timeout_s: Seconds = 20.0
    """How long a decode server waits for the answer to a control message."""
    transfer_timeout_s: Seconds = 60.0
    """How long one transfer may take before it is cancelled and reported as failed."""
    digest: DigestMode = "full"
    """Which blocks' bytes are hashed on both sides and compared after the transfer."""
    allocation: Policy = "runs"
    """``runs`` prefers contiguous blocks; ``stock`` leaves the engine's own order of free blocks."""
    transport: TransportName = "nixl"
    """Byte mover: ``nixl``, or ``loopback`` inside one process."""
    nixl_backends: tuple[str, ...] = ("UCX",)
    """NIXL plugins to load, in order of preference."""
    lanes: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    """Byte movers over which a decode server spreads a large transfer; each takes a core while it copies."""

    def __post_init__(self) -> None:
        if self.host in ANY_ADDRESS and self.advertise_host is None:
            raise ValueError(
                f"host: given {self.host!r}, allowed with advertise_host, which peers connect to"
            )
        if not self.heartbeat_s < self.lease_s:
            raise ValueError(
                f"heartbeat_s: given {self.heartbeat_s}, allowed: less than lease_s={self.lease_s}"
            )
        if not self.lease_s <= self.longest_lease_s:
            raise ValueError(
                f"lease_s: given {self.lease_s}, allowed: at most longest_lease_s={self.longest_lease_s}"
            )
