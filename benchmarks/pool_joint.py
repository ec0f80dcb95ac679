"""A prefill pool and a decode pool, both churned, and the block runs that move between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.benchmarks.pool_engine import Sequence, Tally, make_manager, sequences
from penstock.benchmarks.pool_peers import Policy, equip
from penstock.connectors.runs import Run, runs_of
from penstock.simulation.traces import TraceRequest

PREFILL_BLOCKS = 12_000
DECODE_BLOCKS = 6_800
"""Of which about 80 % belong to requests that are being decoded."""
PAIRS: tuple[Policy, ...] = ("stock", "flowkv-unpaired", "flowkv")


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a decode server pulls for one request: runs at the source and at the target, in token order."""

    source: list[Run]
    target: list[Run]


def hand_over(
    policy: Policy,
    rows: Iterator[TraceRequest],
    seed: int,
    warm: int,
    measured: int,
    decode_blocks: int = DECODE_BLOCKS,
) -> tuple[list[Transfer], Tally]:
    """A prefill pool feeds a decode pool; returns the last ``measured`` transfers and decode's tally."""
    prefill = equip(make_manager(PREFILL_BLOCKS), policy)
    decode = equip(make_manager(decode_blocks), policy)
    transfers: list[Transfer] = []
    held: dict[str, Sequence] = {}

    def offer(sequence: Sequence) -> None:
        held[sequence.request.request_id] = sequence
        decode.submit(sequence.again(), runs_of(sequence.block_ids[: sequence.prompt_blocks]))

    def loaded(sequence: Sequence, source: list[Run]) -> None:
        target = runs_of(sequence.block_ids[sequence.hit_blocks : sequence.prompt_blocks])
        transfers.append(Transfer(source, target))
        prefill.release(held.pop(sequence.request.request_id))

    prefill.on_prefilled, decode.on_load = offer, loaded
    source = sequences(rows, seed)
    for goal in (warm, measured):
        transfers.clear()
        decode.tally = Tally()
        while len(transfers) < goal:
            while len(prefill.waiting) < 4 and len(decode.waiting) < 16:
                prefill.submit(next(source))
            prefill.step()
            decode.step()
    return transfers[:measured], decode.tally
