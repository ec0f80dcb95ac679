# ruff: noqa: ANN001, ANN201, ANN202
"""Estimated masses of pages from their clusters, and exact ones of pages that are read anyway."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.launch import power, products_in_fp32, tile, warps
from penstock.kernels.triton.summaries import Summaries

ROWS = 64
"""Clusters that a program scores at a time."""


@triton.jit
def _masses(
    query, means, scales, sizes, spreads, table, counts, logs, products,
    heads, group, size, clusters, pages, scale, query_request, query_head,
    GROUP: tl.constexpr, PAGES: tl.constexpr, CLUSTERS: tl.constexpr, SIZE: tl.constexpr,
    FP32: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    request = row // heads
    head = row % heads
    ROWS: tl.constexpr = PAGES * CLUSTERS
    each = tl.arange(0, ROWS)
    page = tl.program_id(0) * PAGES + each // CLUSTERS
    cluster = each % CLUSTERS
    member = tl.arange(0, GROUP)
    channel = tl.arange(0, SIZE)
    known = page < tl.load(counts + request)
    used = known & (cluster < clusters)
    block = tl.load(table + request * pages + page, mask=known, other=0).to(tl.int64)
    cell = (block * heads + head) * clusters + cluster
    asked = query + request * query_request + (head * group + member)[:, None] * query_head + channel[None, :]
    q = tl.load(asked, mask=(member < group)[:, None] & (channel < size)[None, :], other=0.0)
    place = means + cell[:, None] * size + channel[None, :]
    mean = tl.load(place, mask=used[:, None] & (channel < size)[None, :], other=0)
    length = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) * scale * scale
    if FP32:
        product = tl.dot(q.to(tl.float32), tl.trans(mean.to(tl.float32)), input_precision="tf32x3")
    else:
        product = tl.dot(q, tl.trans(mean.to(q.dtype)))
    step = tl.load(scales + cell, mask=used, other=0.0)
    product = product * scale * step[None, :]
    count = tl.load(sizes + cell, mask=used, other=0.0)
    spread = tl.load(spreads + cell, mask=used, other=0.0)
    if PRODUCTS:
        at = (row * group + member)[:, None] * pages * clusters + (page * clusters + cluster)[None, :]
        tl.store(products + at, product, mask=(member < group)[:, None] & used[None, :])
    # The sum of few exponentials of wide deviation is that of the largest: clusters.log_masses.
    room = tl.log(tl.maximum(count, 1.0))[None, :]
    variance = length[:, None] * spread[None, :]
    above = tl.where(variance < 2 * room, room + variance / 2, tl.sqrt(variance) * tl.sqrt(2 * room))
    log = tl.where(used[None, :] & (count > 0)[None, :], product + above, float("-inf"))
    # A page of which something is no number, or the query, is marked by +inf: it must be read.
    log = tl.where(used[None, :] & (product + above != product + above), float("inf"), log)
    log = tl.reshape(log, [GROUP, PAGES, CLUSTERS])
    peak = tl.max(log, 2)
    base = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)
    # The largest adds 1: below that is only a page without any.
    page_log = tl.log(tl.maximum(tl.sum(tl.exp(log - base[:, :, None]), 2), 1.0)) + base
    page_log = tl.where(tl.abs(peak) < float("inf"), page_log, peak)
    out_page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    at = (row * group + member)[:, None] * pages + out_page[None, :]
    tl.store(logs + at, page_log, mask=(member < group)[:, None] & (out_page < pages)[None, :])


@triton.jit
def first_recent(length, indexed, recent, block_tokens):
    """The first of the last pages, which are read whatever they hold: recent tokens, and what no summary
    has."""
    return tl.minimum(tl.maximum(length - recent, 0) // block_tokens, indexed)


@triton.jit
def exact_log(
    query, keys, table, request, head, page, length, group, size, pages, block_tokens, scale,
    query_request, query_head, key_block, key_token, key_head,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """The exact log of the mass of one page [GROUP]; +inf if something in it is no number."""
    token = tl.arange(0, TOKENS)
    member = tl.arange(0, GROUP)
    channel = tl.arange(0, SIZE)
    present = (token < block_tokens) & (page * block_tokens + token < length)
    asked = query + request * query_request + (head * group + member)[:, None] * query_head
    q = tl.load(
        asked + channel[None, :], mask=(member < group)[:, None] & (channel < size)[None, :], other=0.0
    )
    block = tl.load(table + request * pages + page).to(tl.int64)
    place = keys + block * key_block + head * key_head + token[:, None] * key_token + channel[None, :]
    key = tl.load(place, mask=present[:, None] & (channel < size)[None, :], other=0.0)
    if FP32:
        score = tl.dot(q.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision="tf32x3")
    else:
        score = tl.dot(q, tl.trans(key))
    score = score * scale
    score = tl.where(score == score, score, float("inf"))  # noqa: PLR0124
    score = tl.where(present[None, :], score, float("-inf"))
    peak = tl.max(score, 1)
    base = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)
    log = tl.log(tl.maximum(tl.sum(tl.exp(score - base[:, None]), 1), 1.0)) + base
    return tl.where(tl.abs(peak) < float("inf"), log, peak)


@triton.jit
def _exact(
    query, keys, table, lengths, counts, logs,
    heads, group, size, pages, block_tokens, sinks, recent, scale,
    query_request, query_head, key_block, key_token, key_head,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    request = row // heads
    slot = tl.program_id(0)
    length = tl.load(lengths + request)
    tail = first_recent(length, tl.load(counts + request), recent, block_tokens)
    page = tl.where(slot < sinks, slot, tail + slot - sinks)
    # A sink that is recent too is done once.
    wanted = (page * block_tokens < length) & ((slot < sinks) | (page >= sinks)) & (page < pages)
    if wanted:
        log = exact_log(
            query, keys, table, request, row % heads, page, length,
            group, size, pages, block_tokens, scale,
            query_request, query_head, key_block, key_token, key_head, GROUP, TOKENS, SIZE, FP32,
        )  # fmt: skip
        member = tl.arange(0, GROUP)
        tl.store(logs + (row * group + member) * pages + page, log, mask=member < group)


def page_log_masses(
    query: torch.Tensor,
    index: Summaries,
    table: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    logs: torch.Tensor,
    products: torch.Tensor | None = None,
) -> None:
    """Logs of the estimated sums of exponentials of pages into ``logs`` (float32 [B, H, G, P]).

    ``query`` [B, H * G, D]; ``table`` int32 [B, P], the block (or cell) of ``index`` of each page;
    ``counts`` int32 [B], pages that have a summary; the others become -inf. +inf marks a page that must be
    read, since a key or the query is not finite. ``products`` (float32 [B, H, G, P * S]), if given, takes
    the scores of the means.
    """
    requests, heads, group, pages = logs.shape
    clusters = power(index.clusters)
    each = max(1, ROWS // clusters)
    _masses[(triton.cdiv(pages, each), requests * heads)](
        query, index.means, index.scales, index.sizes, index.spreads, table, counts, logs,
        logs if products is None else products,
        heads, group, query.shape[-1], index.clusters, pages, scale,
        query.stride(0), query.stride(1),
        GROUP=tile(group), PAGES=each, CLUSTERS=clusters, SIZE=tile(query.shape[-1]),
        FP32=products_in_fp32(query, *([index.means] if index.means.is_floating_point() else [])),
        PRODUCTS=products is not None, num_warps=warps(each * clusters * tile(query.shape[-1])),
    )  # fmt: skip


def exact_log_masses(
    query: torch.Tensor,
    cache: PagedCache,
    table: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    logs: torch.Tensor,
    *,
    sink_pages: int,
    recent_tokens: int,
    tail_pages: int,
) -> None:
    """Exact logs over estimated ones for pages that are read anyway.

    These are the first ``sink_pages``, and from the page with the first of the last ``recent_tokens``, or the
    first without a summary, ``tail_pages`` more; later ones keep what they have and are read without being
    counted. ``lengths`` int32 [B] are the requests' tokens; the rest is as in ``page_log_masses``.
    """
    requests, heads, group, pages = logs.shape
    keys = cache.keys
    _exact[(sink_pages + tail_pages, requests * heads)](
        query, keys, table, lengths, counts, logs,
        heads, group, cache.head_size, pages, cache.block_tokens, sink_pages, recent_tokens, scale,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        GROUP=tile(group), TOKENS=tile(cache.block_tokens), SIZE=tile(cache.head_size),
        FP32=products_in_fp32(query, keys),
        num_warps=warps(tile(cache.block_tokens) * tile(cache.head_size)),
    )  # fmt: skip
