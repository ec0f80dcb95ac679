"""What the kernels compute, in torch, one row after another: the reference beside them.

Masses, top-p and merges are those of :mod:`penstock.kernels.sparse`; here they meet block tables and
lengths. Nothing is read that the kernels may not read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from penstock.kernels.sparse.attention import Partial, attend, merge, weighted
from penstock.kernels.sparse.clusters import log_masses
from penstock.kernels.sparse.groups import agree
from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.summaries import Summaries

NOTHING = -torch.inf


def rows(query: torch.Tensor, heads: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Request, KV head and its query [1, G, D], for each row of ``query`` [B, H * G, D]."""
    for request, heads_of in enumerate(query.unflatten(1, (heads, -1))):
        for head, group in enumerate(heads_of):
            yield request, head, group[None]


def page_log_masses(
    query: torch.Tensor, index: Summaries, table: torch.Tensor, counts: torch.Tensor, scale: float
) -> torch.Tensor:
    """See ``masses.page_log_masses``: float32 [B, H, G, P]."""
    heads = index.means.shape[1]
    logs = torch.full((len(table), heads, query.shape[1] // heads, table.shape[1]), NOTHING)
    for request, head, asked in rows(query.float() * scale, heads):
        blocks = table[request, : counts[request]].long()
        means = index.means[blocks, head].float() * index.scales[blocks, head, :, None]
        sizes, spreads = index.sizes[blocks, head], index.spreads[blocks, head]
        products = asked[0] @ means.flatten(0, 1).T
        deviations = (asked[0].square().sum(-1, keepdim=True) * spreads.flatten()).sqrt()
        found = log_masses(products, deviations, sizes.flatten()).unflatten(1, sizes.shape)
        logs[request, head, :, : len(blocks)] = found.logsumexp(-1).nan_to_num(torch.inf, torch.inf, NOTHING)
    return logs


def tokens_of(rows: torch.Tensor, blocks: torch.Tensor, head: int, length: int) -> torch.Tensor:
    """The first ``length`` tokens of ``rows`` [blocks, N, H, D] in ``blocks`` and ``head``, float32 [1,
    length, D]."""
    return rows[blocks.long(), :, head].flatten(0, 1)[:length].float()[None]


def exact_log_masses(
    query: torch.Tensor, cache: PagedCache, table: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """Exact logs of the masses of all pages, float32 [B, H, G, P]; -inf beyond the lengths."""
    size = cache.block_tokens
    logs = torch.full((len(table), cache.heads, query.shape[1] // cache.heads, table.shape[1]), NOTHING)
    for request, head, asked in rows(query.float() * scale, cache.heads):
        length = int(lengths[request])
        for page in range(-(-length // size)):
            keys = tokens_of(
                cache.keys, table[request, page : page + 1], head, min(size, length - page * size)
            )
            logs[request, head, :, page] = (asked @ keys.transpose(1, 2)).logsumexp(-1)[0]
    return logs.nan_to_num(torch.inf, torch.inf, NOTHING)


def chosen(
    logs: torch.Tensor, kept: torch.Tensor, wanted: float, others: torch.Tensor | None = None
) -> torch.Tensor:
    """Units that one row reads, bool [U]: ``kept`` (bool [U]), and what ``logs`` float32 [G, U] ask for
    besides."""
    kept = kept | (logs.isnan() | (logs == torch.inf)).any(0)
    known = logs.masked_fill(~logs.isfinite(), NOTHING)
    total = known.logsumexp(-1) if others is None else torch.logaddexp(known.logsumexp(-1), others)
    shares = (known - total[:, None]).exp().nan_to_num(0.0)
    missing = (wanted - (shares * kept).sum(-1)).clamp(min=0)
    free = shares.masked_fill(kept, 0.0)
    return kept | (agree("ranked", free[None], missing[None])[0] & (free > 0).any(0))


def attention(
    query: torch.Tensor,
    cache: PagedCache,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    read: torch.Tensor,
    rest: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Partial:
    """Attention over the tokens that are ``read`` (bool [R, n] by position): output [B, H * G, D], lse [B,
    H, G].

    ``rest``, if given, has logs float32 [B, H, G, P] and mean values [blocks, H, D] of pages; those of logs
    above -inf are estimated.
    """
    outputs, lses = [], []
    for row, (request, head, asked) in enumerate(rows(query.float() * scale, cache.heads)):
        places = read[row, : int(lengths[request])].nonzero()[:, 0]
        blocks, within = table[request, places // cache.block_tokens].long(), places % cache.block_tokens
        part = attend(asked, cache.keys[blocks, within, head][None], cache.values[blocks, within, head][None])
        if rest is not None:
            logs, means = rest
            pages = (logs[request, head] > NOTHING).any(0).nonzero()[:, 0]
            values = means[table[request, pages].long(), head]
            part = merge(part, weighted(logs[request, head, :, pages][None], values[None]))
        outputs.append(part.output[0])
        lses.append(part.lse[0])
    group, size = query.shape[1] // cache.heads, query.shape[2]
    shape = (len(query), cache.heads, group)
    return Partial(torch.stack(outputs).view(len(query), -1, size), torch.stack(lses).view(shape))
