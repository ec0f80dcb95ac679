"""FlowKV as a transfer backend of SGLang: the manager of one rank.

SGLang's own classes keep the rooms' states, the bootstrap server, the heartbeats and the sockets. Stock
backends write a prompt's pages into decode's memory; here prefill promises them, chunk by chunk, and decode
reads them, under the same leases, digests and transports as with vLLM.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import AbortNotification, CommonKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.utils.network import NetworkAddress, get_local_ip_auto

from penstock.connectors.compat import mismatches
from penstock.connectors.errors import MessageError
from penstock.plugins.cache_digest import digester_of
from penstock.plugins.sglang.flowkv_settings import flowkv_config, require_transferable
from penstock.plugins.sglang.installation import upstream
from penstock.plugins.sglang.room_messages import (
    Chunk,
    Ending,
    Greeting,
    Wanted,
    frames,
    from_decode,
    from_prefill,
)
from penstock.plugins.sglang.settings import inherited
from penstock.plugins.sglang.transfer_ends import Cache, ReadingEnd, ServingEnd
from penstock.plugins.sglang.transfer_record import pool_of, record_of
from penstock.plugins.sglang.transfer_series import TransferSeries

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt
    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.server_args import ServerArgs

    from penstock.connectors.config import FlowKVConfig

ABORT = b"ABORT"
ANNOUNCERS = 4
"""Threads that tell decode servers of chunks: one that is down delays its own."""
REMEMBERED = 4096
"""Rooms refused before their request came that are remembered."""


class FlowKVManager(CommonKVManager):
    """One rank's transfers. Its state machine, sockets and bootstrap are ``CommonKVManager``'s."""

    kv_status_msg_tag = b"KVSTATUS"
    kv_status_msg_carries_reason = True
    supports_role_switch = True
    supports_deferred_decode_kv_release = True
    reports_transfer_latency = True

    def __init__(
        self,
        args: KVArgs,
        disaggregation_mode: DisaggregationMode,
        server_args: ServerArgs,
        is_mla_backend: bool | None = False,
    ) -> None:
        require_transferable(server_args)
        config = flowkv_config(inherited(), host=get_local_ip_auto())
        cache = _cache(args, server_args, config)
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        self._agent = secrets.token_hex(16)
        self._record = cache.record
        self._series = TransferSeries(time.monotonic, upstream().logger)
        self._stopped = threading.Event()
        self.serving: ServingEnd | None = None
        self.reading: ReadingEnd | None = None
        if disaggregation_mode == DisaggregationMode.PREFILL:
            self.serving = ServingEnd(cache, config)
            self._objections: dict[str, str] = {}
            self.refused: OrderedDict[int, str] = OrderedDict()
            self._announcers = ThreadPoolExecutor(ANNOUNCERS, "flowkv-announce")
            self._unready: deque[tuple[Any, Callable[[], None]]] = deque()
        else:
            self.reading = ReadingEnd(cache, config)
            self._aux_of: dict[int, int] = {}
            self.incompatible: set[str] = set()
            self._heartbeats = self._start_heartbeat_checker_thread()
        self._listener = threading.Thread(target=self._listen, name="flowkv-rooms", daemon=True)
        self._listener.start()
        upstream().logger.info(
            "penstock: flowkv %s: %d pages of %d KiB, layout %s, %s descriptors a run, digest %s",
            disaggregation_mode.value,
            cache.geometry.num_blocks,
            cache.geometry.block_bytes // 1024,
            cache.record.layout,
            cache.geometry.extents_per_run or "many",
            cache.record.digest,
        )

    def teardown(self) -> None:
        """Let go of everything but the pool, before the other role is set up."""
        self._stopped.set()
        self._listener.join()
        if self.serving is not None:
            self._announcers.shutdown(cancel_futures=True)
            self.serving.close()
        if self.reading is not None:
            self._heartbeat_shutdown.set()
            self._heartbeats.join()
            self.reading.close()
        self._zmq_ctx.destroy(linger=0)

    # Prefill

    def add_transfer_request(
        self,
        bootstrap_room: int,
        kv_indices: npt.NDArray[np.int32],
        index_slice: slice,
        is_last_chunk: bool,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
        *,
        wait_event: Any = None,
        **_: Any,
    ) -> None:
        """Promise computed pages of a room to decode, once the device has written them."""
        ending = None
        if is_last_chunk:
            assert aux_index is not None
            ending = Ending(int(index_slice.stop), self._aux(aux_index))
        pages = [int(page) for page in kv_indices]

        def announce() -> None:
            self._announce(bootstrap_room, pages, int(index_slice.start), ending)

        if wait_event is not None or self._unready:
            self._unready.append((wait_event, announce))
        else:
            announce()

    def advance_serving(self) -> None:
        """Announce what has become ready, and conclude the rooms that ended."""
        assert self.serving is not None
        while self._unready and (self._unready[0][0] is None or self._unready[0][0].query()):
            self._unready.popleft()[1]()
        for end in self.serving.rooms.advance():
            if end.reason is None:
                self.update_status(end.room, KVPoll.Success)
            else:
                self.fail_room(end.room, end.reason)
        self._series.show(self.serving.rooms.take_stats())

    def fail_room(self, room: int, reason: str) -> None:
        """Prefill gives a room up, and tells decode why."""
        assert self.serving is not None
        self.serving.rooms.forget(room)
        targets = [(info.endpoint, info.dst_port) for info in self.transfer_infos.get(room, {}).values()]
        self.record_failure(room, reason)
        self.update_status(room, KVPoll.Failed)
        if targets:
            self._announcers.submit(
                self.send_kv_status_message,
                targets=targets,
                bootstrap_room=room,
                status=KVPoll.Failed,
                failure_reason=reason,
            )

    def _announce(self, room: int, pages: list[int], first: int, ending: Ending | None) -> None:
        assert self.serving is not None
        if self.request_status.get(room, KVPoll.Failed) == KVPoll.Failed:
            return
        hand_off = msgspec.to_builtins(self.serving.rooms.offer(room, pages)) if pages else None
        if ending is not None:
            self.serving.rooms.complete(room)
        parts = frames(Chunk(room, first, hand_off, ending))
        for wanted in self.transfer_infos[room].values():
            endpoint = NetworkAddress(wanted.host, wanted.port)
            self._announcers.submit(
                self._send_multipart_locked, endpoint.to_tcp(), parts, is_ipv6=endpoint.is_ipv6
            )

    def _aux(self, index: int) -> list[bytes]:
        args = self.kv_args
        return [
            ctypes.string_at(address + index * size, size)
            for address, size in zip(args.aux_data_ptrs, args.aux_item_lens, strict=True)
        ]

    def _from_decode(self, parts: list[bytes]) -> None:
        if parts[0] == ABORT:
            notification = AbortNotification.from_zmq(parts)
            if notification is not None:
                self._abort(notification.room)
            return
        match from_decode(parts):
            case Greeting(agent=agent, record=record):
                self._objections[agent] = "; ".join(
                    f"{m.field} is {m.ours} at prefill and {m.theirs} at decode"
                    for m in mismatches(self._record, record)
                )
            case Wanted() as wanted:
                self._meet(wanted)

    def _meet(self, wanted: Wanted) -> None:
        self.transfer_infos[wanted.room] = {wanted.agent: wanted}
        objection = self._objections.get(wanted.agent, "the decode server has not introduced itself")
        if objection:
            self._series.failed("handshake")
            self._refuse(wanted.room, f"cannot exchange KV: {objection}")
            return
        self.req_to_decode_prefix_len[wanted.room] = wanted.prefix_tokens
        self.update_status(wanted.room, KVPoll.WaitingForInput)

    def _abort(self, room: int) -> None:
        if self.request_status.get(room) != KVPoll.Success:
            self._refuse(room, "decode gave the request up")

    def _refuse(self, room: int, reason: str) -> None:
        """Fail a room whether its request has come or not. The scheduler lets go of the leases."""
        self.refused[room] = reason
        while len(self.refused) > REMEMBERED:
            self.refused.popitem(last=False)
        if self.conclude_failure(bootstrap_room=room, failure_reason=reason) is not None:
            self.refused.pop(room, None)

    # Decode

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As stock's; servers that cannot work together fail the requests, and no scheduler."""
        try:
            known: bool = super().try_ensure_parallel_info(bootstrap_addr)
        except (RuntimeError, AssertionError) as error:
            self._refuse_prefill(bootstrap_addr, str(error))
            return False
        if known and (theirs := self.prefill_info_table[bootstrap_addr].attn_tp_size) != self.attn_tp_size:
            del self.prefill_info_table[bootstrap_addr]
            self._refuse_prefill(
                bootstrap_addr,
                f"tensor_parallel_size is {theirs} at prefill and {self.attn_tp_size} at decode",
            )
            return False
        if known:
            self.incompatible.discard(bootstrap_addr)
        return known

    def build_receiver_registration_message(self) -> list[bytes]:
        """What a prefill rank hears before the first room."""
        return frames(Greeting(self._agent, self._record))

    def build_receiver_metadata_message(
        self,
        *,
        bootstrap_room: int,
        kv_indices: npt.NDArray[np.int32],
        aux_index: int | None,
        decode_prefix_len: int | None,
        **_: Any,
    ) -> list[bytes]:
        """Open a room for the pages that SGLang has allocated; what its prefill rank hears of it."""
        assert self.reading is not None
        assert aux_index is not None
        self._aux_of[bootstrap_room] = aux_index
        self.reading.rooms.open(bootstrap_room, [int(page) for page in kv_indices])
        return frames(
            Wanted(self._agent, bootstrap_room, self.local_ip, self.rank_port, decode_prefix_len or 0)
        )

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        """Pages may be used again once no read of ours writes to them; nobody else does."""
        assert self.reading is not None
        self.advance_reading()
        return not self.reading.rooms.is_reading(bootstrap_room)

    def advance_reading(self) -> None:
        """Conclude the rooms whose pages have all come, and those that failed."""
        assert self.reading is not None
        for arrival in self.reading.rooms.advance():
            if arrival.error is None and arrival.aux is not None:
                upstream().logger.debug(
                    "penstock: flowkv room %d took %d descriptors", arrival.room, arrival.descriptors
                )
                self._store_aux(arrival.room, arrival.aux)
            else:
                self.record_failure(arrival.room, str(arrival.error))
                self.update_status(arrival.room, KVPoll.Failed)
        self._series.show(self.reading.rooms.take_stats())

    def forget_room(self, room: int) -> None:
        """Nothing of the room is wanted any more."""
        assert self.reading is not None
        self.reading.rooms.forget(room)
        self._aux_of.pop(room, None)

    def _store_aux(self, room: int, aux: list[bytes]) -> None:
        args, index = self.kv_args, self._aux_of[room]
        if [len(row) for row in aux] != list(args.aux_item_lens):
            self.record_failure(
                room, f"metadata rows are {[len(row) for row in aux]} bytes, {args.aux_item_lens} here"
            )
            self.update_status(room, KVPoll.Failed)
            return
        for row, address in zip(aux, args.aux_data_ptrs, strict=True):
            ctypes.memmove(address + index * len(row), row, len(row))
        self.update_status(room, KVPoll.Success)

    def _refuse_prefill(self, address: str, reason: str) -> None:
        self.incompatible.add(address)
        for room in list(self.addr_to_rooms_tracker[address]):
            self._series.failed("handshake")
            self.record_failure(room, f"prefill server {address}: {reason}")
            self.update_status(room, KVPoll.Failed)

    def _from_prefill(self, parts: list[bytes]) -> None:
        assert self.reading is not None
        status = self.parse_kv_status_message(parts)
        if status is None:
            self.reading.rooms.take(from_prefill(parts))
        elif status[1] == KVPoll.Failed:
            # Nothing else is for prefill to say: a room has succeeded when its pages are here.
            room, poll, rank, reason = status
            self.apply_prefill_status(
                bootstrap_room=room, status=poll, prefill_rank=rank, failure_reason=reason
            )

    # Both

    def _listen(self) -> None:
        hear = self._from_decode if self.serving is not None else self._from_prefill
        receive = self._make_worker_recv(self.server_socket)
        while not self._stopped.is_set():
            parts = receive()
            if parts is None:
                continue
            try:
                hear(parts)
            except MessageError as error:
                upstream().logger.warning("penstock: flowkv left a message alone: %s", error)


def _cache(args: KVArgs, server_args: ServerArgs, config: FlowKVConfig) -> Cache:
    pool = pool_of(args)
    geometry = pool.geometry()
    digester = digester_of(geometry, pool.k_buffer[0])
    digest = "off" if config.digest == "off" else f"{digester.algorithm} {config.digest}"
    record = record_of(args, server_args, pool, geometry, digest)
    name = f"sglang-{secrets.token_hex(4)}-{args.engine_rank}"
    return Cache(name, geometry, record, digester, pool.epochs, args.page_size)
