# ruff: noqa: ANN001, ANN201, ANN202
"""What is kept of each block of a paged KV cache, and the kernel that takes it.

The clusters are those of :mod:`penstock.kernels.sparse.page_clusters`: they belong to the block alone, so
that requests that share a block share them. The mean value stands for the block in the estimate of what is
not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.launch import tile, warps


@dataclass(frozen=True, slots=True)
class Summaries:
    """``S`` clusters of each block and KV head: ``means`` int8 [blocks, H, S, D], to be multiplied by
    ``scales`` [blocks, H, S]; ``sizes`` and ``spreads`` [blocks, H, S], the latter the mean square of a
    channel's distance to the mean; and ``values`` [blocks, H, D], the mean of the block's values, in the
    cache's type."""

    means: torch.Tensor
    scales: torch.Tensor
    sizes: torch.Tensor
    spreads: torch.Tensor
    values: torch.Tensor

    @classmethod
    def empty(cls, cache: PagedCache, clusters: int) -> Summaries:
        """Room for all blocks of ``cache``; nothing in it is valid yet."""
        blocks, _, heads, size = cache.keys.shape
        device = cache.keys.device
        means = torch.zeros(blocks, heads, clusters, size, dtype=torch.int8, device=device)
        scales, sizes, spreads = (torch.zeros(blocks, heads, clusters, device=device) for _ in range(3))
        values = torch.zeros(blocks, heads, size, dtype=cache.values.dtype, device=device)
        return cls(means, scales, sizes, spreads, values)

    @property
    def clusters(self) -> int:
        """``S``."""
        return self.means.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(part.nbytes for part in (self.means, self.scales, self.sizes, self.spreads, self.values))


@triton.jit
def _gaps(keys, means, inside):
    # |k - c|^2 without |k|^2, which all clusters have in common.
    gap = tl.sum(means * means, 1)[None, :] - 2 * tl.dot(keys, tl.trans(means), input_precision="tf32x3")
    return tl.where(inside[None, :], gap, float("inf"))


@triton.jit
def _cluster_means(keys, labels, token_inside, CLUSTERS: tl.constexpr):
    belongs = (tl.arange(0, CLUSTERS)[:, None] == labels[None, :]) & token_inside[None, :]
    size = tl.sum(belongs.to(tl.float32), 1)
    total = tl.dot(belongs.to(tl.float32), keys, input_precision="tf32x3")
    return belongs, size, total / tl.maximum(size, 1.0)[:, None]


@triton.jit
def summarise_one(
    block, head, keys, values, means, scales, sizes, spreads, mean_values,
    block_tokens, clusters, size, heads, rounds,
    key_block, key_token, key_head, value_block, value_token, value_head,
    TOKENS: tl.constexpr, CLUSTERS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The summary of one full ``block`` (int64) in one KV ``head`` (int64)."""
    token = tl.arange(0, TOKENS)
    channel = tl.arange(0, SIZE)
    cluster = tl.arange(0, CLUSTERS)
    token_inside = token < block_tokens
    present = token_inside[:, None] & (channel < size)[None, :]
    place = keys + block * key_block + head * key_head + token[:, None] * key_token + channel[None, :]
    key = tl.load(place, mask=present, other=0.0).to(tl.float32)
    labels = token * clusters // block_tokens
    for _ in range(rounds):
        _, _, mean = _cluster_means(key, labels, token_inside, CLUSTERS)
        labels = tl.argmin(_gaps(key, mean, cluster < clusters), 1)
    belongs, count, mean = _cluster_means(key, labels, token_inside, CLUSTERS)
    # Distances to the own mean from the sums of squares: both are of one page, so little cancels.
    length = tl.sum(key * key, 1)
    square = tl.sum(tl.where(belongs, length[None, :], 0.0), 1) / tl.maximum(count, 1.0)
    spread = tl.maximum(square - tl.sum(mean * mean, 1), 0.0) / size
    scale = tl.maximum(tl.max(tl.abs(mean), 1), 1e-30) / 127
    # Keys that are not finite show in the scale; a code has no value for them.
    broken = tl.sum((mean * 0 != 0).to(tl.int32), 1) > 0
    scale = tl.where(broken, float("nan"), scale)
    code = mean / scale[:, None]
    code = tl.where(code == code, code, 0.0)  # noqa: PLR0124
    code = tl.floor(tl.abs(code) + 0.5) * tl.where(code < 0, -1.0, 1.0)
    out = (block * heads + head) * clusters + cluster
    known = cluster < clusters
    tl.store(
        means + out[:, None] * size + channel[None, :], code.to(tl.int8),
        mask=known[:, None] & (channel < size)[None, :],
    )  # fmt: skip
    tl.store(scales + out, scale, mask=known)
    tl.store(sizes + out, count, mask=known)
    tl.store(spreads + out, spread, mask=known)
    place = values + block * value_block + head * value_head + token[:, None] * value_token + channel[None, :]
    value = tl.sum(tl.load(place, mask=present, other=0.0).to(tl.float32), 0) / block_tokens
    place = mean_values + (block * heads + head) * size + channel
    tl.store(place, value.to(mean_values.dtype.element_ty), mask=channel < size)


@triton.jit
def _summarise(
    keys, values, blocks, means, scales, sizes, spreads, mean_values,
    block_tokens, clusters, size, heads, rounds,
    key_block, key_token, key_head, value_block, value_token, value_head,
    TOKENS: tl.constexpr, CLUSTERS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block = tl.load(blocks + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    summarise_one(
        block, head, keys, values, means, scales, sizes, spreads, mean_values,
        block_tokens, clusters, size, heads, rounds,
        key_block, key_token, key_head, value_block, value_token, value_head,
        TOKENS, CLUSTERS, SIZE,
    )  # fmt: skip


def summarise_blocks(cache: PagedCache, blocks: torch.Tensor, into: Summaries, rounds: int) -> None:
    """Take the summaries of ``blocks`` (int32 or int64 [P], all full) of ``cache``.

    k-means starts from runs of positions and makes ``rounds`` rounds, as ``PageClusters.of``. Keys that are
    not finite leave scales that are not, by which the choice knows that the block must be read.
    """
    if not len(blocks):
        return
    keys, values = cache.keys, cache.values
    _summarise[(len(blocks), cache.heads)](
        keys, values, blocks, into.means, into.scales, into.sizes, into.spreads, into.values,
        cache.block_tokens, into.clusters, cache.head_size, cache.heads, rounds,
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        TOKENS=tile(cache.block_tokens), CLUSTERS=tile(into.clusters), SIZE=tile(cache.head_size),
        num_warps=warps(tile(cache.block_tokens) * tile(cache.head_size)),
    )  # fmt: skip
