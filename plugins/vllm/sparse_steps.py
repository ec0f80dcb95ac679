"""Which requests of a step may be sparse on a CPU, and where their query rows and those of the others are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class OtherRows:
    """Rows of the step (int64 [T]) that are dense whatever they hold, and stock's description of them."""

    rows: torch.Tensor
    metadata: Any


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """The requests of a step that may be sparse, each with its ``tokens`` and block numbers (int64 [P]).

    ``rows`` says how many of the tokens, the last ones, are queries; ``first``, where these are in the
    step. ``order`` (int64 [R * H]) has, of all rows and KV heads of the step, theirs, by request, then head,
    then row; None where they are all there are, one a request. ``others`` are the other requests, if any.
    """

    tokens: Sequence[int]
    blocks: Sequence[torch.Tensor]
    rows: Sequence[int]
    first: Sequence[int]
    order: torch.Tensor | None
    others: OtherRows | None


def most_decode_rows(vllm_config: Any) -> int:
    """Query rows of a request that decodes: a token, and as many drafts as there may be."""
    speculation = vllm_config.speculative_config
    return 1 + (speculation.num_speculative_tokens or 0 if speculation else 0)


def decode_step(
    common: Any,
    *,
    most_rows: int,
    least_tokens: int,
    block_tokens: int,
    heads: int,
    describe: Callable[[Any], Any],
) -> DecodeStep | None:
    """The requests of ``common`` (vLLM's ``CommonAttentionMetadata``) with at most ``most_rows`` rows; None
    where none of them has ``least_tokens``.

    ``describe`` is stock's description of a step like ``common``.
    """
    starts, tokens = common.query_start_loc.tolist(), common.seq_lens.tolist()
    rows = [after - before for before, after in pairwise(starts)]
    if not tokens or min(tokens) < 1 or min(rows) < 1 or starts[-1] != common.num_actual_tokens:
        # Rows that pad a batch.
        return None
    few = [number for number, count in enumerate(rows) if count <= most_rows]
    if max((tokens[number] for number in few), default=0) < least_tokens:
        return None
    many = [number for number, count in enumerate(rows) if count > most_rows]
    table = common.block_table_tensor.long()
    plain = not many and max(rows) == 1
    return DecodeStep(
        tokens=[tokens[number] for number in few],
        blocks=[table[number, : -(-tokens[number] // block_tokens)] for number in few],
        rows=[rows[number] for number in few],
        first=[starts[number] for number in few],
        order=None if plain else _order(few, starts, heads),
        others=_others(common, many, starts, describe) if many else None,
    )


def _order(requests: Sequence[int], starts: Sequence[int], heads: int) -> torch.Tensor:
    parts = [
        torch.arange(starts[number], starts[number + 1])[None] * heads + torch.arange(heads)[:, None]
        for number in requests
    ]
    return torch.cat([part.flatten() for part in parts])


def _others(
    common: Any, requests: Sequence[int], starts: Sequence[int], describe: Callable[[Any], Any]
) -> OtherRows:
    rows = torch.cat([torch.arange(starts[number], starts[number + 1]) for number in requests])
    lengths = [starts[number + 1] - starts[number] for number in requests]
    own_starts = torch.tensor([0, *lengths]).cumsum(0).to(common.query_start_loc.dtype)
    chosen = torch.tensor(requests)
    seq_lens = common.seq_lens[chosen]
    only = replace(
        common,
        query_start_loc=own_starts,
        query_start_loc_cpu=own_starts,
        seq_lens=seq_lens,
        num_reqs=len(requests),
        num_actual_tokens=len(rows),
        max_query_len=max(lengths),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[chosen],
        slot_mapping=common.slot_mapping[rows],
    )
    return OtherRows(rows, describe(only))
