"""FlowKV in vLLM's scheduler process: who hands off what to whom, and which blocks may go back when."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from vllm.v1.request import RequestStatus

from penstock.connectors.config import FlowKVConfig
from penstock.connectors.control import ControlClient, ControlServer
from penstock.connectors.errors import HandOffError
from penstock.connectors.handoff import (
    Address,
    HandOff,
    check_host,
    fingerprint,
    parse_hand_off,
    wants_remote_decode,
    wants_remote_prefill,
)
from penstock.connectors.inbound import InboundRequests, Verdict
from penstock.connectors.keeper import LeaseKeeper
from penstock.connectors.lease import LeaseEnd
from penstock.connectors.receiver import Load
from penstock.connectors.runs import runs_of
from penstock.connectors.sender import Sender
from penstock.connectors.transfer_stats import TransferStatsData
from penstock.plugins.vllm.record import block_size_of
from penstock.plugins.vllm.run_pool import RunPool
from penstock.plugins.vllm.transfer_meta import HandshakeMetadata, RejectedLoad, StepMetadata, WorkerMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

HANDED_OFF = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


class TransferScheduler:
    """Scheduler half of the connector; every method mirrors a ``KVConnectorBase_V1`` hook."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlowKVConfig, engine_id: str
    ) -> None:
        transfer_config = vllm_config.kv_transfer_config
        self._config = config
        self._block_size = block_size_of(kv_cache_config)
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        self._recompute = transfer_config.kv_load_failure_policy == "recompute"
        self._manager: KVCacheManager | None = None
        self._pool: RunPool | None = None
        self._inbound: InboundRequests | None = None
        self._outbound: dict[str, Request] = {}
        self._step = StepMetadata()
        self._stats = TransferStatsData()
        self._server: ControlServer | None = None
        self._sender: Sender | None = None
        self._keeper: LeaseKeeper | None = None
        if transfer_config.is_kv_producer:
            self._open_control_channel(vllm_config, engine_id)
        if transfer_config.is_kv_consumer:
            client = ControlClient(config.shared_key, config.handshake_timeout_s)
            self._keeper = LeaseKeeper(client, config.heartbeat_s, time.monotonic)
            self._inbound = InboundRequests(self._keeper)

    def bind_kv_cache_manager(self, manager: KVCacheManager) -> None:
        """Take over the choice of free blocks, unless the configuration leaves it to the engine."""
        self._manager = manager
        if self._config.allocation == "runs":
            self._pool = RunPool.install(manager)
            if self._sender:
                self._sender.use_epochs(self._pool.epochs)

    def set_xfer_handshake_metadata(self, metadata: dict[int, HandshakeMetadata]) -> None:
        """Answer handshakes from now on: every rank's memory is known."""
        if self._sender:
            instance = self._sender.instance
            self._sender.open(
                {r: msgspec.structs.replace(m.welcome, instance=instance) for r, m in metadata.items()}
            )

    def on_new_request(self, request: Request) -> None:
        """Note what the request asks for and keep its lease alive from its arrival on."""
        params = request.kv_transfer_params
        if wants_remote_prefill(params) and self._inbound:
            self._receive(request, self._inbound)
        elif wants_remote_decode(params) and self._sender:
            self._outbound[request.request_id] = request
        if self._pool:
            hand_off = self._inbound.hand_off_of(request.request_id) if self._inbound else None
            num_blocks = self._num_prompt_blocks(request)
            self._pool.announce(request.request_id, num_blocks, hand_off.runs if hand_off else ())

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Every prompt token that the local prefix cache lacks comes from the sender, once."""
        verdict = self._inbound.verdict(request.request_id) if self._inbound else Verdict.LOCAL
        if verdict is Verdict.WAIT:
            return None, False
        if verdict is Verdict.LOCAL or (verdict is Verdict.BROKEN and self._recompute):
            return 0, False
        return request.num_prompt_tokens - num_computed_tokens, True

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Blocks are there: order the load, or give the lease back if nothing is needed."""
        request_id, inbound = request.request_id, self._inbound
        if inbound is None:
            return
        if num_external_tokens == 0:
            inbound.skip(request_id)
            return
        if inbound.verdict(request_id) not in (Verdict.PULL, Verdict.BROKEN):
            return
        first = (request.num_prompt_tokens - num_external_tokens) // self._block_size
        targets = blocks.get_block_ids()[0][first : self._num_prompt_blocks(request)]
        hand_off, error = inbound.hand_off_of(request_id), inbound.error_of(request_id)
        if hand_off is not None and error is None:
            self._step.loads.append(Load(request_id, hand_off, first, tuple(runs_of(targets))))
        else:
            assert error is not None
            self._step.rejected.append(RejectedLoad(request_id, tuple(targets), str(error), error.kind))
        inbound.start(request_id)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        """This step's orders to the workers."""
        step, self._step = self._step, StepMetadata()
        step.to_digest |= self._prompts_completed_by(scheduler_output)
        for ended in self._sender.collect() if self._sender else ():
            step.finished_sending.add(ended.request_id)
            if ended.end is LeaseEnd.EXPIRED:
                self._stats.expired_leases += 1
                logger.warning(
                    "FlowKV lease of request %s expired before it was read; its blocks are free again (%s)",
                    ended.request_id,
                    f"renewed {ended.renewals} times" if ended.renewals else "no decode server asked for it",
                )
        return step

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """Take the workers' digests and the ends of loads."""
        meta = output.kv_connector_worker_meta
        failed: set[str] = set()
        if isinstance(meta, WorkerMetadata):
            failed = meta.failed
            for request_id, by_rank in meta.digests.items():
                for rank, digests in by_rank.items():
                    self._add_digests(request_id, rank, digests)
        for request_id in output.finished_recving or ():
            if self._inbound:
                self._inbound.finish_load(request_id, failed=request_id in failed)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Hand a prefilled prompt off, or settle what is left of a request that ended."""
        if self._pool:
            self._pool.forget(request.request_id)
        if self._inbound:
            self._inbound.end(request.request_id)
        outbound = self._outbound.pop(request.request_id, None)
        num_blocks = self._num_prompt_blocks(request)
        if outbound is None or self._sender is None or request.status not in HANDED_OFF:
            return False, None
        if len(block_ids) < num_blocks or request.prompt_token_ids is None:
            return False, None
        prompt_blocks = block_ids[:num_blocks]
        if self._digests_late(request):
            self._step.to_digest[request.request_id] = prompt_blocks
        hand_off = self._sender.hand_off(
            request.request_id,
            runs_of(prompt_blocks),
            num_tokens=request.num_prompt_tokens,
            prompt=prompt_fingerprint(request),
            block_size=self._block_size,
            ranks=self._ranks,
        )
        return True, hand_off.to_params()

    def take_stats(self) -> TransferStatsData | None:
        """Counters of this half since the last call."""
        if self._sender:
            self._stats.stale_reads_refused += self._sender.leases.take_stale_refused()
        if self._stats.is_empty:
            return None
        stats, self._stats = self._stats, TransferStatsData()
        return stats

    def shutdown(self) -> None:
        """Release the leases that this engine still holds elsewhere, stop answering."""
        if self._keeper:
            self._keeper.close()
            self._keeper = None
        if self._server:
            self._server.close()
            self._server = None

    def _open_control_channel(self, vllm_config: VllmConfig, engine_id: str) -> None:
        config = self._config
        rank = vllm_config.parallel_config.data_parallel_rank
        port = config.port + rank if config.port else 0
        server = self._server = ControlServer((config.host, port), config.shared_key, own_key=True)
        address = Address(config.advertise_host or config.host, server.port, server.public_key)
        self._sender = Sender(engine_id, address, config, time.monotonic)
        self._server.start(self._sender.answer)
        logger.info("FlowKV control channel listens on %s:%d", config.host, self._server.port)

    def _receive(self, request: Request, inbound: InboundRequests) -> None:
        try:
            if request.abort_immediately:
                # vLLM's front-end has refused the real request and sends this stand-in for our clean-up.
                inbound.give_back(self._parsed(request), "the decode server refused the request")
            else:
                inbound.add(request.request_id, self._checked_hand_off(request))
        except HandOffError as error:
            logger.warning("FlowKV request %s: %s", request.request_id, error)
            inbound.add_broken(request.request_id, error)
            if self._recompute:
                self._stats.add_failure(error.kind)

    def _checked_hand_off(self, request: Request) -> HandOff:
        hand_off = self._parsed(request)
        for name, theirs, ours in (
            ("prompt length", hand_off.remote_num_tokens, request.num_prompt_tokens),
            ("block_size", hand_off.block_size, self._block_size),
            ("tensor_parallel_size", hand_off.tp_size, self._ranks),
            ("prompt fingerprint", hand_off.remote_prompt, prompt_fingerprint(request)),
        ):
            if theirs != ours:
                raise HandOffError(f"{name} is {ours} here and {theirs} at the prefill server")
        return hand_off

    def _parsed(self, request: Request) -> HandOff:
        hand_off = parse_hand_off(request.kv_transfer_params or {})
        check_host(hand_off, self._config.allowed_hosts)
        return hand_off

    def _num_prompt_blocks(self, request: Request) -> int:
        return -(-int(request.num_prompt_tokens) // self._block_size)

    def _prompts_completed_by(self, output: SchedulerOutput) -> dict[str, list[int]]:
        """Blocks of the prompts that this step completes and that end with it, so that nothing follows."""
        if self._config.digest == "off" or self._manager is None:
            return {}
        done: dict[str, list[int]] = {}
        for request_id in self._outbound.keys() & output.num_scheduled_tokens.keys():
            request = self._outbound[request_id]
            computed = request.num_computed_tokens + output.num_scheduled_tokens[request_id]
            if computed >= request.num_prompt_tokens and not self._digests_late(request):
                blocks = self._manager.get_block_ids(request_id)[0]
                done[request_id] = list(blocks[: self._num_prompt_blocks(request)])
        return done

    def _digests_late(self, request: Request) -> bool:
        """A request that generates beyond the prompt keeps writing its last prompt block until it ends."""
        return self._config.digest != "off" and request.max_tokens != 1

    def _add_digests(self, request_id: str, rank: int, digests: bytes) -> None:
        if self._sender:
            self._sender.add_digests(request_id, rank, np.frombuffer(digests, dtype="<u8"))


def prompt_fingerprint(request: Request) -> str:
    """Fingerprint of everything in a request that its prompt's KV depends on."""
    extras = [feature.identifier for feature in request.mm_features]
    extras += [request.lora_request.lora_name if request.lora_request else "", request.cache_salt or ""]
    return fingerprint(request.prompt_token_ids or (), extras)
