"""Attention over lists, estimates and merges against plain attention."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.triton import reference
from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.choose import ReadLists
from penstock.kernels.triton.decode import Parts, decode_parts, estimate_parts, merge_parts

SHAPES = [
    # group, head size, tokens of a page, of a unit, splits, type
    (1, 64, 16, 16, 1, torch.bfloat16),
    (2, 80, 16, 1, 2, torch.float32),
    (4, 128, 128, 128, 2, torch.bfloat16),
    (7, 96, 48, 48, 1, torch.float16),
    (16, 256, 32, 1, 1, torch.float32),
]


def lists(requests, taken, unit):
    """``ReadLists`` that name the units of ``taken`` (bool [R, U])."""
    heads, block = requests.cache.heads, requests.cache.block_tokens
    out = ReadLists.empty(*taken.shape[:1], 1, taken.shape[1], taken.device)
    for row, units in enumerate(taken):
        request = row // heads
        tokens = units.nonzero()[:, 0] * unit
        numbers = requests.table[request, tokens // block].long() * (block // unit) + tokens % block // unit
        # What lies beyond a list may name any block.
        out.entries[row] = 1
        out.entries[row, : len(tokens)] = numbers.int()
        ends = (tokens + unit).clamp(max=int(requests.lengths[request]))
        out.lengths[row] = int((ends - tokens).sum())
    return out


def close(device, dtype):
    if dtype == torch.float32:
        return {"rtol": 1e-5, "atol": 1e-5}
    return {"rtol": 1e-2, "atol": 1e-2} if device.type == "cpu" else {"rtol": 3e-2, "atol": 3e-2}


@pytest.mark.parametrize(("group", "size", "block", "unit", "splits", "dtype"), SHAPES)
def test_attention_over_lists_is_that_of_torch(device, make, group, size, block, unit, splits, dtype):
    lengths = [2 * block + 3, 1, 2 * block]
    requests = make(lengths, group=group, size=size, block_tokens=block, dtype=dtype)
    units = -(-max(lengths) // unit)
    taken = torch.rand(6, units, generator=torch.Generator().manual_seed(unit)) < 0.4
    taken[0], taken[1] = True, False
    taken &= (torch.arange(units) * unit)[None] < requests.lengths.repeat_interleave(2)[:, None]
    read = taken.repeat_interleave(unit, 1)
    want = reference.attention(requests.query, requests.cache, requests.table, requests.lengths, 0.1, read)
    there, parts = requests.to(device), Parts.empty(6, splits, group, size, device)
    parts.outputs.fill_(torch.nan)
    reads = lists(requests, taken, unit)
    reads = ReadLists(*(getattr(reads, name).to(device) for name in ReadLists.__slots__))
    out, lse = torch.empty_like(there.query), torch.empty(3, 2, group, device=device)
    decode_parts(there.query, there.cache, reads, 0.1, parts, unit_tokens=unit, splits=splits)
    merge_parts(parts, 2, out, lse)
    torch.testing.assert_close(out.cpu().float(), want.output, **close(device, dtype))
    torch.testing.assert_close(lse.cpu(), want.lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("splits", [1, 2])
def test_what_is_not_read_is_estimated_by_means(device, make, splits):
    requests = make([70 * 16, 33], block_tokens=16, pages=71)
    logs = torch.randn(2, 2, 4, 71, generator=torch.Generator().manual_seed(3))
    taken = torch.rand(4, 71, generator=torch.Generator().manual_seed(4)) < 0.3
    taken[3] = True
    means = requests.cache.values.nanmean(1)
    counts = requests.full
    beyond = torch.arange(71)[None] >= counts[:, None]
    rest = logs.masked_fill(taken.view(2, 2, 1, 71) | beyond[:, None, None], -torch.inf)
    nothing = torch.zeros(4, 71 * 16, dtype=torch.bool)
    want = reference.attention(
        requests.query, requests.cache, requests.table, requests.lengths, 1.0, nothing, (rest, means)
    )
    there, parts = requests.to(device), Parts.empty(4, splits + 1, 4, 64, device)
    parts.outputs[:, 0], parts.lses[:, 0] = 0, -torch.inf
    estimate_parts(
        logs.to(device), taken.to(device, torch.uint8), means.to(device), there.table, there.full, parts,
        first=1, splits=splits,
    )  # fmt: skip
    out, lse = torch.empty_like(there.query), torch.empty(2, 2, 4, device=device)
    merge_parts(parts, 2, out, lse)
    torch.testing.assert_close(out.cpu(), want.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.cpu(), want.lse, rtol=1e-5, atol=1e-5)


def test_a_key_that_is_no_number_shows_where_it_is_read(device, make):
    requests = make([40])
    requests.cache.values[requests.table[0, 1].long(), 2, 0, 3] = torch.nan
    there = requests.to(device)
    out, lse = torch.empty_like(there.query), torch.empty(1, 2, 4, device=device)
    for pages, shows in (([0, 2], False), ([1], True)):
        taken = torch.zeros(2, 3, dtype=torch.bool)
        taken[:, pages] = True
        reads = lists(requests, taken, 16)
        reads = ReadLists(*(getattr(reads, name).to(device) for name in ReadLists.__slots__))
        parts = Parts.empty(2, 1, 4, 64, device)
        decode_parts(there.query, there.cache, reads, 0.1, parts, unit_tokens=16, splits=1)
        merge_parts(parts, 2, out, lse)
        assert out[0, :4, 3].isnan().all().item() is shows
        assert not out[0, 4:].isnan().any()


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 6), "allowed: two alike"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5).half(), "one type"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5, 4).transpose(2, 3), "stride 1"),
    ],
)
def test_caches_that_kernels_cannot_read_are_refused(keys, values, message):
    with pytest.raises(ValueError, match=message):
        PagedCache(keys, values)
