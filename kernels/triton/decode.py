# ruff: noqa: ANN001, ANN202
"""Decode attention over lists of pages or tokens: split-KV, an estimate of what is not read, and their merge.

A row's list is cut into parts that are done at the same time, each with its output and log-sum-exp; what is
not read adds parts of its own, through the mean values of pages. The merge is
:func:`penstock.kernels.sparse.attention.merge` over all parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.choose import ReadLists
from penstock.kernels.triton.launch import power, products_in_fp32, tile, warps

TOKENS = 64
"""Tokens, or pages of an estimate, that a program multiplies at a time."""


@dataclass(frozen=True, slots=True)
class Parts:
    """``outputs`` float32 [R, K, G, D] and ``lses`` float32 [R, K, G] of ``K`` parts of one softmax."""

    outputs: torch.Tensor
    lses: torch.Tensor

    @classmethod
    def empty(cls, rows: int, parts: int, group: int, size: int, device: torch.device) -> Parts:
        """Room for them."""
        return cls(
            torch.empty(rows, parts, group, size, device=device),
            torch.empty(rows, parts, group, device=device),
        )

    def first(self, parts: int) -> Parts:
        """The memory of the first ``parts`` of each row, packed, for use without the others."""
        rows, _, group, size = self.outputs.shape
        packed = self.outputs.flatten()[: rows * parts * group * size].view(rows, parts, group, size)
        return Parts(packed, self.lses.flatten()[: rows * parts * group].view(rows, parts, group))


@triton.jit
def _softmax_step(score, value, peak, total, output, FP32: tl.constexpr):
    """One more tile of scores [GROUP, TOKENS], -inf for none, and values [TOKENS, SIZE]."""
    higher = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp(score - base[:, None])
    fading = tl.exp(peak - base)
    if FP32:
        part = tl.dot(weight, value.to(tl.float32), input_precision="tf32x3")
    else:
        part = tl.dot(weight.to(value.dtype), value)
    return higher, total * fading + tl.sum(weight, 1), output * fading[:, None] + part


@triton.jit
def _store_part(
    outputs, lses, row, part, parts, group, size, peak, total, output, GROUP: tl.constexpr, SIZE: tl.constexpr
):
    member = tl.arange(0, GROUP)
    channel = tl.arange(0, SIZE)
    # Not a number is not 0 and stays; nothing at all is 0 and -inf.
    nothing = total == 0
    place = (row * parts + part) * group + member
    lse = tl.where(nothing, float("-inf"), peak + tl.log(tl.where(nothing, 1.0, total)))
    tl.store(lses + place, lse, mask=member < group)
    share = output / tl.where(nothing, 1.0, total)[:, None]
    inside = (member < group)[:, None] & (channel < size)[None, :]
    tl.store(outputs + place[:, None] * size + channel[None, :], share, mask=inside)


@triton.jit
def _decode(
    query, keys, values, entries, lengths, outputs, lses,
    heads, group, size, units, unit_tokens, block_tokens, parts, splits, scale,
    query_request, query_head, key_block, key_token, key_head, value_block, value_token, value_head,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    request = row // heads
    head = row % heads
    member = tl.arange(0, GROUP)
    channel = tl.arange(0, SIZE)
    length = tl.load(lengths + row)
    each = (((length + splits - 1) // splits) + TOKENS - 1) // TOKENS * TOKENS
    start = split * each
    stop = tl.minimum(start + each, length)
    asked = query + request * query_request + (head * group + member)[:, None] * query_head + channel[None, :]
    q = tl.load(asked, mask=(member < group)[:, None] & (channel < size)[None, :], other=0.0)
    if FP32:
        q = q.to(tl.float32)
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    output = tl.zeros([GROUP, SIZE], tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        present = token < stop
        entry = tl.load(entries + row * units + token // unit_tokens, mask=present, other=0)
        slot = entry.to(tl.int64) * unit_tokens + token % unit_tokens
        block = slot // block_tokens
        within = slot % block_tokens
        inside = present[:, None] & (channel < size)[None, :]
        place = keys + block * key_block + within * key_token + head * key_head
        key = tl.load(place[:, None] + channel[None, :], mask=inside, other=0.0)
        place = values + block * value_block + within * value_token + head * value_head
        value = tl.load(place[:, None] + channel[None, :], mask=inside, other=0.0)
        if FP32:
            score = tl.dot(q, tl.trans(key.to(tl.float32)), input_precision="tf32x3")
        else:
            score = tl.dot(q, tl.trans(key))
        score = tl.where(present[None, :], score * scale, float("-inf"))
        peak, total, output = _softmax_step(score, value, peak, total, output, FP32)
    _store_part(outputs, lses, row, split, parts, group, size, peak, total, output, GROUP, SIZE)


@triton.jit
def _estimate(
    logs, taken, means, table, counts, outputs, lses,
    heads, group, size, units, pages, parts, first_part, splits,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    request = row // heads
    head = row % heads
    member = tl.arange(0, GROUP)
    channel = tl.arange(0, SIZE)
    count = tl.load(counts + request)
    each = (((count + splits - 1) // splits) + TOKENS - 1) // TOKENS * TOKENS
    start = split * each
    stop = tl.minimum(start + each, count)
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    output = tl.zeros([GROUP, SIZE], tl.float32)
    for first in range(start, stop, TOKENS):
        page = first + tl.arange(0, TOKENS)
        present = page < stop
        present = present & (tl.load(taken + row * units + page, mask=present, other=1) == 0)
        place = logs + (row * group + member)[:, None] * units + page[None, :]
        log = tl.load(place, mask=(member < group)[:, None] & present[None, :], other=float("-inf"))
        block = tl.load(table + request * pages + page, mask=present, other=0).to(tl.int64)
        place = means + (block * heads + head)[:, None] * size + channel[None, :]
        value = tl.load(place, mask=present[:, None] & (channel < size)[None, :], other=0.0)
        peak, total, output = _softmax_step(log, value, peak, total, output, FP32)
    part = first_part + split
    _store_part(outputs, lses, row, part, parts, group, size, peak, total, output, GROUP, SIZE)


@triton.jit
def _merge(
    outputs, lses, out, out_lse, heads, group, size, parts, out_request, out_head,
    PARTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    member = tl.program_id(1)
    part = tl.arange(0, PARTS)
    channel = tl.arange(0, SIZE)
    place = (row * parts + part) * group + member
    lse = tl.load(lses + place, mask=part < parts, other=float("-inf"))
    peak = tl.max(lse, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(lse - base)
    total = tl.sum(weight, 0)
    inside = (part < parts)[:, None] & (channel < size)[None, :]
    output = tl.load(outputs + place[:, None] * size + channel[None, :], mask=inside, other=0.0)
    merged = tl.sum(output * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    head = row % heads * group + member
    place = out + row // heads * out_request + head * out_head + channel
    tl.store(place, merged.to(out.dtype.element_ty), mask=channel < size)
    log = tl.where(total == 0, float("-inf"), base + tl.log(tl.where(total == 0, 1.0, total)))
    tl.store(out_lse + row * group + member, log)


def decode_parts(
    query: torch.Tensor,
    cache: PagedCache,
    reads: ReadLists,
    scale: float,
    parts: Parts,
    *,
    unit_tokens: int,
    splits: int,
) -> None:
    """Attention of ``query`` [B, H * G, D] over what each row reads into the first ``splits`` of ``parts``.

    Nothing but the listed tokens is loaded, so that what a block holds beyond them, or another block, cannot
    show.
    """
    rows, _, group, size = parts.outputs.shape
    keys, values = cache.keys, cache.values
    _decode[(splits, rows)](
        query, keys, values, reads.entries, reads.lengths, parts.outputs, parts.lses,
        cache.heads, group, size, reads.entries.shape[1], unit_tokens, cache.block_tokens,
        parts.lses.shape[1], splits, scale, query.stride(0), query.stride(1),
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        GROUP=tile(group), TOKENS=TOKENS, SIZE=tile(size), FP32=products_in_fp32(query, keys),
        num_warps=warps(TOKENS * tile(size)),
    )  # fmt: skip


def estimate_parts(
    logs: torch.Tensor,
    taken: torch.Tensor,
    means: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
    parts: Parts,
    *,
    first: int,
    splits: int,
) -> None:
    """Attention over pages that are not ``taken`` (uint8 [R, U]), each of mass ``exp(logs)`` (float32 [B, H,
    G, U]) with its mean value of ``means`` [blocks, H, D], into ``splits`` parts from ``first`` on."""
    requests, heads, group, units = logs.shape
    size = means.shape[-1]
    _estimate[(splits, requests * heads)](
        logs, taken, means, table, counts, parts.outputs, parts.lses,
        heads, group, size, units, table.shape[1], parts.lses.shape[1], first, splits,
        GROUP=tile(group), TOKENS=TOKENS, SIZE=tile(size), FP32=products_in_fp32(means),
        num_warps=warps(TOKENS * tile(size)),
    )  # fmt: skip


def merge_parts(parts: Parts, heads: int, out: torch.Tensor, lse: torch.Tensor) -> None:
    """All ``parts`` of ``B * heads`` rows as one: ``out`` [B, H * G, D] of any type, ``lse`` float32 [B, H,
    G]."""
    rows, count, group, size = parts.outputs.shape
    _merge[(rows, group)](
        parts.outputs, parts.lses, out, lse, heads, group, size, count, out.stride(0), out.stride(1),
        PARTS=power(count), SIZE=power(size),
    )  # fmt: skip
