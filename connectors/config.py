"""FlowKV's configuration: one frozen struct, the same keys in every engine."""

from __future__ import annotations

from typing import Literal

import msgspec

DigestMode = Literal["off", "sampled", "full"]
Policy = Literal["runs", "stock"]


class FlowKVConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All knobs of FlowKV. Nothing below this struct reads an environment variable.

    Every duration is in seconds, every size in bytes unless the name says otherwise.
    """

    host: str = "127.0.0.1"
    """Address that the control channel binds to, and that peers are told unless ``advertise_host`` is set."""
    port: int = 0
    """TCP port of the control channel; 0 lets the system choose a free one."""
    advertise_host: str | None = None
    """Address that peers use to reach this control channel, where it differs from ``host``."""
    shared_key: str | None = None
    """Secret that both roles hold; with it, unsigned, altered or replayed control messages are refused."""
    allowed_hosts: tuple[str, ...] = ()
    """Prefill hosts that a decode server may be told to pull from; empty allows every host."""
    lease_s: float = 30.0
    """How long a prefill server keeps a request's blocks after the last sign of life from the decode side."""
    longest_lease_s: float = 600.0
    """Bound on a lease's life, however often the decode side renews it."""
    heartbeat_s: float = 5.0
    """Interval at which a decode server renews the leases that it waits on."""
    handshake_timeout_s: float = 10.0
    """How long a decode server waits for the answer to a control message."""
    transfer_timeout_s: float = 60.0
    """How long one transfer may take before it is cancelled and reported as failed."""
    digest: DigestMode = "full"
    """Which blocks' bytes are hashed on both sides and compared after the transfer."""
    allocation: Policy = "runs"
    """``runs`` prefers contiguous blocks; ``stock`` leaves the engine's own order of free blocks."""
    transport: str = "nixl"
    """Byte mover: ``nixl``, or ``loopback`` inside one process."""
    nixl_backends: tuple[str, ...] = ("UCX",)
    """NIXL plugins to load, in order of preference."""
