# ruff: noqa: ANN001, ANN202
"""k-means over a segment of keys: the kernels of :mod:`penstock.kernels.sparse.kmeans` and ``clusters``.

Assignment is a tiled matrix product with a running minimum. The update sorts tokens by cluster and sums each
cluster's rows in that order, without atomics, so that a run gives the same bits every time.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from penstock.kernels.sparse.clusters import Clusters
from penstock.kernels.triton.launch import power, tile, warps

Precision = Literal["tf32x3", "tf32"]
TOKENS = 64
CENTROIDS = 64
"""Of heads of up to 128; half of them of larger ones, whose tiles fill more shared memory."""
MEMBERS = 32


@triton.jit
def _nearest(
    keys, centroids, labels, tokens, clusters, size, key_head, key_token, centre_head, centre_row,
    TOKENS: tl.constexpr, CENTROIDS: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, SIZE)
    present = (token < tokens)[:, None] & (channel < size)[None, :]
    place = token.to(tl.int64)[:, None] * key_token + channel[None, :]
    key = tl.load(keys + head * key_head + place, mask=present, other=0.0).to(tl.float32)
    least = tl.full([TOKENS], float("inf"), tl.float32)
    winner = tl.zeros([TOKENS], tl.int32)
    for first in range(0, clusters, CENTROIDS):
        number = first + tl.arange(0, CENTROIDS)
        known = (number < clusters)[:, None] & (channel < size)[None, :]
        row = number[:, None] * centre_row + channel[None, :]
        centre = tl.load(centroids + head * centre_head + row, mask=known, other=0.0).to(tl.float32)
        # |k - c|^2 without |k|^2, which is the same for every centroid.
        product = tl.dot(key, tl.trans(centre), input_precision=PRECISION)
        gap = tl.sum(centre * centre, 1)[None, :] - 2 * product
        # What is no number wins nothing, so that a label is always a cluster.
        valid = (number < clusters)[None, :] & (gap == gap)  # noqa: PLR0124
        gap = tl.where(valid, gap, float("inf"))
        nearest = tl.min(gap, 1)
        winner = tl.where(nearest < least, first + tl.argmin(gap, 1), winner)
        least = tl.minimum(least, nearest)
    tl.store(labels + head * tokens + token, winner, mask=token < tokens)


@triton.jit
def _means(
    rows, order, bounds, previous, means, spreads, tokens, clusters, size, row_head, row_token,
    MEMBERS: tl.constexpr, SIZE: tl.constexpr, SPREADS: tl.constexpr,
):  # fmt: skip
    cluster = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, SIZE)
    inside = channel < size
    first = tl.load(bounds + head * (clusters + 1) + cluster)
    last = tl.load(bounds + head * (clusters + 1) + cluster + 1)
    count = last - first
    total = tl.zeros([SIZE], tl.float32)
    for at in range(first, last, MEMBERS):
        member = at + tl.arange(0, MEMBERS)
        token = tl.load(order + head * tokens + member, mask=member < last, other=0)
        place = rows + head * row_head + token[:, None] * row_token + channel[None, :]
        present = (member < last)[:, None] & inside[None, :]
        total += tl.sum(tl.load(place, mask=present, other=0.0).to(tl.float32), 0)
    out = (head * clusters + cluster) * size + channel
    mean = tl.load(previous + out, mask=inside, other=0.0)
    if count > 0:
        mean = total / count.to(tl.float32)
    tl.store(means + out, mean, mask=inside)
    if SPREADS:
        square = tl.zeros([SIZE], tl.float32)
        for at in range(first, last, MEMBERS):
            member = at + tl.arange(0, MEMBERS)
            token = tl.load(order + head * tokens + member, mask=member < last, other=0)
            place = rows + head * row_head + token[:, None] * row_token + channel[None, :]
            present = (member < last)[:, None] & inside[None, :]
            gap = tl.load(place, mask=present, other=0.0).to(tl.float32) - mean[None, :]
            square += tl.sum(tl.where(present, gap * gap, 0.0), 0)
        share = tl.sum(square, 0) / (tl.maximum(count, 1) * size).to(tl.float32)
        tl.store(spreads + head * clusters + cluster, share)


def nearest(keys: torch.Tensor, centroids: torch.Tensor, precision: Precision = "tf32x3") -> torch.Tensor:
    """``penstock.kernels.sparse.kmeans.nearest``, int32 [H, n], of ``keys`` [H, n, D] of any float type.

    ``tf32`` is faster and may take the second nearest of two that are alike to three digits.
    """
    heads, tokens, size = keys.shape
    labels = torch.empty(heads, tokens, dtype=torch.int32, device=keys.device)
    if labels.numel():
        _nearest[(triton.cdiv(tokens, TOKENS), heads)](
            keys, centroids, labels, tokens, centroids.shape[1], size,
            keys.stride(0), keys.stride(1), centroids.stride(0), centroids.stride(1),
            TOKENS=TOKENS, CENTROIDS=CENTROIDS if size <= 128 else CENTROIDS // 2, SIZE=tile(size),
            PRECISION=precision, num_warps=warps(TOKENS * tile(size)),
        )  # fmt: skip
    return labels


def summarise(
    rows: torch.Tensor, labels: torch.Tensor, previous: torch.Tensor, *, spreads: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means [H, C, D], spreads and sizes (float32 [H, C]) of the clusters that ``labels`` [H, n] make of
    ``rows`` [H, n, D].

    A cluster without tokens keeps its row of ``previous`` (float32 [H, C, D]) and has spread 0. Spreads
    are 0 unless asked for.
    """
    heads, clusters, size = previous.shape
    order, bounds = _grouped(labels, clusters)
    means = torch.empty_like(previous, memory_format=torch.contiguous_format)
    gaps = torch.zeros(heads, clusters, device=rows.device)
    _means[(clusters, heads)](
        rows, order, bounds, previous.contiguous(), means, gaps, labels.shape[1], clusters, size,
        rows.stride(0), rows.stride(1), MEMBERS=MEMBERS, SIZE=power(size), SPREADS=spreads,
    )  # fmt: skip
    return means, gaps, (bounds[:, 1:] - bounds[:, :-1]).float()


def bounded(
    keys: torch.Tensor,
    values: torch.Tensor,
    size: int,
    iterations: int,
    first: torch.Tensor,
    precision: Precision = "tf32x3",
) -> Clusters:
    """Clusters of at most ``size`` tokens, as ``penstock.kernels.sparse.clusters.bounded``, on one device.

    ``first`` (int64 [C], distinct) are the tokens whose keys k-means starts from. It does all ``iterations``:
    to stop when nothing moves, the host would have to wait. For the same reason there are always ``C + n //
    size`` clusters, the empty ones at the end of each head.
    """
    heads, tokens, width = keys.shape
    centroids = keys[:, first].float()
    labels = nearest(keys, centroids, precision)
    for _ in range(iterations - 1):
        centroids = summarise(keys, labels, centroids)[0]
        labels = nearest(keys, centroids, precision)
    labels = _cut(labels.long(), len(first), size)
    most = len(first) + tokens // size
    nothing = torch.zeros(heads, most, width, device=keys.device)
    centres, spreads, sizes = summarise(keys, labels, nothing, spreads=True)
    order = labels.argsort(dim=1, stable=True)
    return Clusters(
        order, labels.gather(1, order), sizes, centres, summarise(values, labels, nothing)[0], spreads
    )


def _cut(labels: torch.Tensor, clusters: int, size: int) -> torch.Tensor:
    """``labels`` int64 [H, n] of the pieces of at most ``size`` tokens, in the order of positions."""
    order, bounds = _grouped(labels, clusters)
    pieces = (bounds.diff(dim=1) + size - 1) // size
    owner = labels.gather(1, order)
    within = torch.arange(labels.shape[1], device=labels.device) - bounds.gather(1, owner)
    cut = (pieces.cumsum(1) - pieces).gather(1, owner) + within // size
    return torch.empty_like(labels).scatter_(1, order, cut)


def _grouped(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens cluster by cluster, int64 [H, n], and where each cluster begins, int64 [H, C + 1]."""
    ranked, order = labels.sort(dim=1, stable=True)
    edges = torch.arange(clusters + 1, device=labels.device, dtype=ranked.dtype)
    return order, torch.searchsorted(ranked, edges.expand(len(labels), -1).contiguous())
