"""Attention in two levels for requests that share a prefix: what is shared is read once for all of them.

FlashInfer calls such a split of one attention matrix composable formats (arXiv 2501.01005). Here is what
needs no GPU: which requests to put together, and the two levels in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from penstock.kernels.sparse.attention import Partial, attend, merge

Table = Sequence[int]


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """``requests`` (numbers in the batch, ascending) whose tables begin with the same ``blocks``."""

    requests: tuple[int, ...]
    blocks: int

    @property
    def saved(self) -> int:
        """Blocks that need not be read again."""
        return (len(self.requests) - 1) * self.blocks


@dataclass(frozen=True, slots=True)
class _Plan:
    """Groups within a subtree of prefixes, what they save, and the requests that no group has yet."""

    groups: tuple[PrefixGroup, ...]
    saved: int
    free: tuple[int, ...]


def prefix_groups(tables: Sequence[Table], least_blocks: int = 1) -> list[PrefixGroup]:
    """Disjoint groups of requests, so that the fewest blocks are read; requests in none read for themselves.

    ``tables`` have the full blocks of each request. A prefix of fewer than ``least_blocks`` is not worth
    a second level. Time is at most cubic in the number of requests.
    """
    order = sorted(range(len(tables)), key=lambda request: tuple(tables[request]))
    shared = [_common(tables[one], tables[other]) for one, other in pairwise(order)]
    plans = _plans(order, shared, least_blocks).values()
    best = max(plans, key=lambda plan: (plan.saved, -len(plan.groups)), default=_Plan((), 0, ()))
    return sorted(best.groups, key=lambda group: group.requests)


def _plans(order: list[int], shared: list[int], least: int) -> dict[int, _Plan]:
    """The best plan for neighbours in ``order`` by how many requests it leaves free for a shorter prefix."""
    if len(order) <= 1:
        return {len(order): _Plan((), 0, tuple(order))}
    depth = min(shared)
    cuts = [place + 1 for place, blocks in enumerate(shared) if blocks == depth]
    bounds = list(zip([0, *cuts], [*cuts, len(order)], strict=True))
    plans = {0: _Plan((), 0, ())}
    for first, last in bounds:
        plans = _together(plans, _plans(order[first:last], shared[first : last - 1], least))
    # Requests that are free here may make a group of this prefix.
    for plan in list(plans.values()):
        if len(plan.free) > 1 and depth >= least:
            group = PrefixGroup(tuple(sorted(plan.free)), depth)
            _keep(plans, _Plan((*plan.groups, group), plan.saved + group.saved, ()))
    return plans


def _together(plans: dict[int, _Plan], others: dict[int, _Plan]) -> dict[int, _Plan]:
    found: dict[int, _Plan] = {}
    for one in plans.values():
        for other in others.values():
            groups, free = (*one.groups, *other.groups), (*one.free, *other.free)
            _keep(found, _Plan(groups, one.saved + other.saved, free))
    return found


def _keep(plans: dict[int, _Plan], plan: _Plan) -> None:
    known = plans.get(len(plan.free))
    if known is None or plan.saved > known.saved:
        plans[len(plan.free)] = plan


def _common(one: Table, other: Table) -> int:
    count = 0
    for first, second in zip(one, other, strict=False):
        if first != second:
            break
        count += 1
    return count


def cascade(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: Sequence[Table],
    lengths: Sequence[int],
    groups: Sequence[PrefixGroup],
) -> Partial:
    """Reference: attention of ``query`` [B, H, G, D], with the softmax scale in it, in two levels.

    ``keys`` and ``values`` are [blocks, N, H, D]; ``tables`` have all blocks of each request, the partial
    last one too, and ``lengths`` their tokens. Output is [B, H, G, D], lse [B, H, G].
    """
    size, group = keys.shape[1], query.shape[2]
    skipped = {request: one.blocks for one in groups for request in one.requests}
    parts = []
    for request, table in enumerate(tables):
        first = skipped.get(request, 0)
        rows = _rows(keys, values, table[first:], lengths[request] - first * size)
        parts.append(attend(query[request], *rows))
    for one in groups:
        together = query[list(one.requests)].permute(1, 0, 2, 3).flatten(1, 2)
        rows = _rows(keys, values, tables[one.requests[0]][: one.blocks], one.blocks * size)
        prefix = attend(together, *rows)
        for place, request in enumerate(one.requests):
            own = slice(place * group, (place + 1) * group)
            parts[request] = merge(Partial(prefix.output[:, own], prefix.lse[:, own]), parts[request])
    return Partial(torch.stack([part.output for part in parts]), torch.stack([part.lse for part in parts]))


def _rows(
    keys: torch.Tensor, values: torch.Tensor, blocks: Table, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.tensor(list(blocks), dtype=torch.int64)
    first, second = (part[numbers].flatten(0, 1)[:tokens].transpose(0, 1) for part in (keys, values))
    return first, second
