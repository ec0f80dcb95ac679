"""NIXL as a byte mover: one READ a request, its descriptor list exactly the plan's moves."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from penstock.connectors.errors import TransferFailedError
from penstock.connectors.geometry import CacheGeometry, Int64Array, MemoryKind, Moves
from penstock.connectors.transports.base import State, TransferStats

logger = logging.getLogger(__name__)


class _Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs: the agent's metadata, and where the registered allocation lies."""

    metadata: bytes
    memory: MemoryKind
    device: int


def _api() -> Any:
    # UCX keeps released registrations for ever unless this is set before it loads (vLLM #32181).
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")
    try:
        from nixl import _api
    except ImportError as error:
        raise TransferFailedError("NIXL is not installed: pip install 'penstock[nixl]'") from error
    return _api


def _errors(api: Any) -> tuple[type[Exception], ...]:
    bindings = api.nixlBind
    return tuple(
        getattr(bindings, name)
        for name in dir(bindings)
        if name.startswith("nixl") and name.endswith("Error")
    )


class NixlTransport:
    """One NIXL agent over one registered allocation.

    Calls into the agent are serialised: it is created without locks of its own.

    Args:
        name: unique name of the agent; a restarted process must take another.
        backends: NIXL plugins to load.
        serves: whether peers read from this agent. A thread of ours then makes progress for them every
            ``PROGRESS_S``. NIXL's own progress thread stays off: it never sleeps, takes 15 to 50 % of a core
            from an idle server, and competes with the reading itself.
    """

    PROGRESS_S = 0.001
    """Connections are set up, and emulated RDMA is served, in steps of this length; 1 % of a core."""

    name = "nixl"

    def __init__(self, name: str, backends: Sequence[str] = ("UCX",), *, serves: bool = True) -> None:
        api = _api()
        self._nixl_errors = _errors(api)
        self._agent = api.nixl_agent(
            name, api.nixl_agent_config(enable_prog_thread=False, backends=list(backends))
        )
        missing = [backend for backend in backends if backend not in self._agent.backends]
        if missing:
            available = ", ".join(self._agent.get_plugin_list())
            raise TransferFailedError(f"NIXL has no plugin {', '.join(missing)}; available: {available}")
        self._lock = threading.Lock()
        self._local = _Endpoint(b"", "DRAM", 0)
        self._peers: dict[str, _Endpoint] = {}
        self._registration: Any = None
        self._closing = threading.Event()
        self._progress: threading.Thread | None = None
        if serves:
            self._progress = threading.Thread(target=self._make_progress, name="flowkv-nixl", daemon=True)
            self._progress.start()

    def register(self, geometry: CacheGeometry) -> bytes:
        """Register the whole allocation; returns the agent's metadata and the allocation's device."""
        regions = [(geometry.base_address, geometry.size, geometry.device, "")]
        with self._lock:
            self._registration = self._agent.register_memory(regions, mem_type=geometry.memory)
            self._local = _Endpoint(self._agent.get_agent_metadata(), geometry.memory, geometry.device)
        return msgspec.msgpack.encode(self._local)

    def connect(self, endpoint: bytes) -> str:
        """Load a peer's metadata; returns its agent name."""
        try:
            remote = msgspec.msgpack.decode(endpoint, type=_Endpoint)
        except msgspec.DecodeError as error:
            raise TransferFailedError(f"not an endpoint of NIXL: {error}") from error
        with self._lock:
            try:
                peer = self._agent.add_remote_agent(remote.metadata)
            except self._nixl_errors as error:
                raise TransferFailedError(f"NIXL cannot load the peer's metadata: {error}") from error
        name = peer.decode() if isinstance(peer, bytes) else str(peer)
        self._peers[name] = remote
        return name

    def disconnect(self, peer: str) -> None:
        """Invalidate a peer's metadata."""
        self._peers.pop(peer, None)
        with self._lock:
            try:
                self._agent.remove_remote_agent(peer)
            except self._nixl_errors as error:
                raise TransferFailedError(f"NIXL cannot forget {peer}: {error}") from error

    def read(self, peer: str, moves: Moves) -> NixlTransfer:
        """Prepare and post one READ for all moves."""
        remote = self._peers.get(peer)
        if remote is None or not len(moves):
            raise TransferFailedError(f"{peer} is not connected" if moves else f"nothing to read from {peer}")
        started = time.perf_counter()
        with self._lock:
            try:
                handle = self._agent.initialize_xfer(
                    "READ",
                    self._descriptors(moves.target, moves.length, self._local),
                    self._descriptors(moves.source, moves.length, remote),
                    peer,
                )
            except self._nixl_errors as error:
                raise TransferFailedError(f"NIXL READ from {peer}: {error}") from error
            try:
                status = self._agent.transfer(handle)
            except self._nixl_errors as error:
                logger.warning("NIXL cannot post a READ from %s: %s", peer, error)
                status = "ERR"
        transfer = NixlTransfer(self._agent, self._lock, self._nixl_errors, handle, moves, started)
        # A part of a failed post may be under way: only a released handle is certain to write no more.
        if status == "ERR" and transfer.cancel():
            raise TransferFailedError(f"NIXL refused to post a READ from {peer}")
        return transfer

    def close(self) -> None:
        """Deregister the memory; peers go with the agent."""
        self._closing.set()
        if self._progress is not None:
            self._progress.join()
        with self._lock:
            if self._registration is not None:
                registration, self._registration = self._registration, None
                try:
                    self._agent.deregister_memory(registration)
                except self._nixl_errors as error:
                    logger.warning("NIXL cannot deregister the KV cache: %s", error)

    def _make_progress(self) -> None:
        complained = False
        while not self._closing.wait(self.PROGRESS_S):
            try:
                with self._lock:
                    self._agent.get_new_notifs()
            except self._nixl_errors as error:
                if not complained:
                    logger.warning("NIXL: %s", error)
                complained = True

    def _descriptors(self, addresses: Int64Array, lengths: Int64Array, side: _Endpoint) -> Any:
        rows = np.empty((len(lengths), 3), dtype=np.uint64)
        rows[:, 0], rows[:, 1], rows[:, 2] = addresses, lengths, side.device
        return self._agent.get_xfer_descs(rows, mem_type=side.memory)


class NixlTransfer:
    """One posted READ."""

    def __init__(
        self,
        agent: Any,
        lock: threading.Lock,
        nixl_errors: tuple[type[Exception], ...],
        handle: Any,
        moves: Moves,
        started: float,
    ) -> None:
        self._agent, self._lock, self._nixl_errors = agent, lock, nixl_errors
        self._handle = handle
        self._moves = moves
        self._started = started
        self._post_s = time.perf_counter() - started
        self._transfer_s = 0.0
        self._state = State.ACTIVE

    def poll(self) -> State:
        """State of the READ; the handle is released as soon as it is final."""
        if self._state is not State.ACTIVE:
            return self._state
        with self._lock:
            try:
                status = self._agent.check_xfer_state(self._handle)
            except self._nixl_errors:
                status = "ERR"
        if status != "PROC":
            self._transfer_s = time.perf_counter() - self._started
            # A failed READ whose handle cannot be released may still be writing: it stays active.
            if status == "DONE":
                self._release()
                self._state = State.DONE
            elif self._release():
                self._state = State.FAILED
        return self._state

    def cancel(self) -> bool:
        """Release the handle, which aborts what is in flight; False while NIXL cannot."""
        if self._state is State.ACTIVE and self._release():
            self._state = State.FAILED
        return self._state is not State.ACTIVE

    def stats(self) -> TransferStats:
        """Descriptors as handed to NIXL, before any merge of its own."""
        return TransferStats(len(self._moves), self._moves.num_bytes, self._post_s, self._transfer_s)

    def _release(self) -> bool:
        with self._lock:
            try:
                self._agent.release_xfer_handle(self._handle)
            except self._nixl_errors:
                return False
        return True
