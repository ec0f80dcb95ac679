"""The prefill side: promises blocks, answers receivers, says which blocks may go back to the pool."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

from penstock.connectors.compat import CompatibilityRecord, mismatches
from penstock.connectors.config import FlowKVConfig
from penstock.connectors.handoff import Address, HandOff
from penstock.connectors.lease import Commit, Digests, Ended, Epochs, LeaseTable
from penstock.connectors.messages import (
    Answer,
    Confirmed,
    EndOfRead,
    Hello,
    NotYet,
    Question,
    Refused,
    Release,
    Released,
    Renew,
    Renewed,
    Stale,
    Welcome,
)
from penstock.connectors.runs import Run


class Sender:
    """One engine's sending half, shared by its scheduler and its control thread.

    Args:
        engine_id: name of the engine; may be the same after a restart.
        address: control channel that receivers are told.
        config: FlowKV's configuration.
        clock: monotonic seconds.
    """

    def __init__(
        self, engine_id: str, address: Address, config: FlowKVConfig, clock: Callable[[], float]
    ) -> None:
        self.engine_id = engine_id
        self.address = address
        self.instance = secrets.token_hex(16)
        self.leases = LeaseTable(
            pickup_s=config.pickup_s,
            duration_s=config.lease_s,
            longest_s=config.longest_lease_s,
            clock=clock,
            expect_digests=config.digest != "off",
        )
        self._welcomes: Mapping[int, Welcome] = {}

    def open(self, welcomes: Mapping[int, Welcome]) -> None:
        """Start to answer handshakes, once every rank's memory is known."""
        self._welcomes = dict(welcomes)

    def hand_off(
        self,
        request_id: str,
        runs: Sequence[Run],
        *,
        num_tokens: int,
        prompt: str,
        block_size: int,
        ranks: int,
    ) -> HandOff:
        """Promise a finished prompt's blocks; the result travels to the decode side.

        Args:
            runs: the prompt's blocks, in token order.
            num_tokens: tokens in the prompt.
            prompt: its fingerprint (see ``handoff.fingerprint``).
            block_size: tokens a block.
            ranks: tensor-parallel ranks that will read.
        """
        host, port, key = self.address
        return HandOff(
            remote_engine_id=self.engine_id,
            remote_request_id=request_id,
            remote_host=host,
            remote_port=port,
            remote_key=key,
            remote_instance=self.instance,
            remote_lease=self.leases.grant(request_id, runs, ranks),
            remote_runs=[(run.start, run.length) for run in runs],
            remote_num_tokens=num_tokens,
            remote_prompt=prompt,
            block_size=block_size,
            tp_size=ranks,
        )

    def use_epochs(self, epochs: Epochs) -> None:
        """Check leased blocks against the pool's allocation counters."""
        self.leases.use_epochs(epochs)

    def add_digests(self, request_id: str, rank: int, digests: Digests) -> None:
        """A rank has hashed a leased request's blocks."""
        self.leases.add_digests(request_id, rank, digests)

    def collect(self) -> list[Ended]:
        """Leases that ended since the last call; their blocks may go back to the pool."""
        return self.leases.collect()

    def answer(self, question: Question) -> Answer:
        """Answer one message of a receiver; called on the control thread."""
        match question:
            case Hello(rank=rank, record=record):
                return self._welcome(rank, record)
            case Renew(leases=leases):
                return Renewed(self.leases.renew(leases))
            case EndOfRead(lease=lease, rank=rank):
                return self._confirm(lease, rank)
            case Release(leases=leases):
                return Released(self.leases.release(leases))

    def _welcome(self, rank: int, record: CompatibilityRecord) -> Answer:
        welcome = self._welcomes.get(rank)
        if welcome is None:
            known = f"ranks 0 to {len(self._welcomes) - 1}" if self._welcomes else "no rank yet"
            return Refused(f"{self.engine_id} serves {known}, not rank {rank}")
        if differing := mismatches(welcome.record, record):
            return Refused("incompatible KV caches", differing)
        return welcome

    def _confirm(self, lease: str, rank: int) -> Answer:
        outcome, digests = self.leases.commit(lease, rank)
        if outcome is Commit.STALE:
            return Stale()
        if outcome is Commit.DIGESTS_PENDING:
            return NotYet()
        return Confirmed(b"" if digests is None else digests.astype("<u8").tobytes())
