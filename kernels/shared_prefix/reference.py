"""Attention over shared runs in torch, to compare kernels with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.kernels.shared_prefix.runs import Run
from penstock.kernels.sparse.attention import Partial, attend, merge

Table = Sequence[int]


def cascade(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: Sequence[Table],
    lengths: Sequence[int],
    runs: Sequence[Run],
) -> Partial:
    """Attention of ``query`` [B, H, G, D], with the softmax scale in it, over ``runs`` first, then over what
    each request has behind its last run.

    ``keys`` and ``values`` are [blocks, N, H, D]; ``tables`` have all blocks of each request, the partial
    last one too, and ``lengths`` their tokens. Output is [B, H, G, D], lse [B, H, G].
    """
    size, group = keys.shape[1], query.shape[2]
    behind = [
        max((run.last for run in runs if request in run.requests), default=0)
        for request in range(len(tables))
    ]
    parts = [
        attend(query[request], *_rows(keys, values, table[first:], lengths[request] - first * size))
        for request, (table, first) in enumerate(zip(tables, behind, strict=True))
    ]
    for run in runs:
        together = query[list(run.requests)].permute(1, 0, 2, 3).flatten(1, 2)
        blocks = tables[run.requests[0]][run.first : run.last]
        prefix = attend(together, *_rows(keys, values, blocks, len(blocks) * size))
        for place, request in enumerate(run.requests):
            own = slice(place * group, (place + 1) * group)
            parts[request] = merge(Partial(prefix.output[:, own], prefix.lse[:, own]), parts[request])
    return Partial(torch.stack([part.output for part in parts]), torch.stack([part.lse for part in parts]))


def _rows(
    keys: torch.Tensor, values: torch.Tensor, blocks: Table, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.tensor(list(blocks), dtype=torch.int64)
    first, second = (part[numbers].flatten(0, 1)[:tokens].transpose(0, 1) for part in (keys, values))
    return first, second
