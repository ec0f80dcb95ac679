"""Summaries of blocks, and masses from them and from keys."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.sparse.page_clusters import PageClusters
from penstock.kernels.triton import reference
from penstock.kernels.triton.masses import exact_log_masses, page_log_masses
from penstock.kernels.triton.summaries import Summaries, summarise_blocks

SCALE = 0.2


def summarised(requests, clusters=4, rounds=2):
    index = Summaries.empty(requests.cache, clusters)
    blocks = [row[:count] for row, count in zip(requests.table, requests.full, strict=True)]
    summarise_blocks(requests.cache, torch.cat(blocks), index, rounds)
    return index


def on_cpu(index):
    return Summaries(*(getattr(index, name).cpu() for name in Summaries.__slots__))


@pytest.mark.parametrize(
    ("block_tokens", "clusters", "size"), [(16, 4, 64), (48, 12, 80), (128, 32, 128), (16, 1, 256)]
)
def test_clusters_of_blocks_are_those_of_torch(device, make, block_tokens, clusters, size):
    requests = make([2 * block_tokens], size=size, block_tokens=block_tokens)
    index = on_cpu(summarised(requests.to(device), clusters))
    blocks = requests.table[0, :2].long()
    want = PageClusters.of(requests.cache.keys[blocks].permute(2, 0, 1, 3), clusters, 2)
    found = index.means[blocks].float() * index.scales[blocks][..., None]
    assert torch.equal(index.sizes[blocks].transpose(0, 1), want.sizes)
    torch.testing.assert_close(index.spreads[blocks].transpose(0, 1), want.spreads, rtol=1e-4, atol=1e-5)
    # Half a step of a code.
    gaps = (found.transpose(0, 1) - want.means).abs().amax(-1)
    assert (gaps <= index.scales[blocks].transpose(0, 1) * 0.501).all()
    mean_values = requests.cache.values[blocks].mean(1)
    torch.testing.assert_close(index.values[blocks], mean_values)


@pytest.mark.parametrize(
    ("group", "size", "block_tokens", "clusters", "dtype"),
    [
        (1, 64, 16, 1, torch.float32),
        (3, 80, 48, 12, torch.bfloat16),
        (16, 128, 128, 32, torch.float16),
        (8, 256, 16, 4, torch.bfloat16),
    ],
)
def test_masses_are_those_of_torch(device, make, group, size, block_tokens, clusters, dtype):
    lengths = [1, 3 * block_tokens + 5]
    requests = make(lengths, group=group, size=size, block_tokens=block_tokens, dtype=dtype)
    there = requests.to(device)
    index = summarised(there, clusters)
    logs = torch.full((2, 2, group, requests.table.shape[1]), torch.nan, device=device)
    page_log_masses(there.query, index, there.table, there.full, SCALE, logs)
    want = reference.page_log_masses(requests.query, on_cpu(index), requests.table, requests.full, SCALE)
    close = {"rtol": 1e-5, "atol": 1e-4} if device.type == "cpu" else {"rtol": 1e-2, "atol": 1e-1}
    torch.testing.assert_close(logs.cpu(), want, **close)
    exact = reference.exact_log_masses(
        requests.query, requests.cache, requests.table, requests.lengths, SCALE
    )
    exact_log_masses(
        there.query, there.cache, there.table, there.lengths, there.full, SCALE, logs,
        sink_pages=1, recent_tokens=1, tail_pages=2,
    )  # fmt: skip
    # Pages 1 and 2 of the longer request are neither first nor recent.
    want[0, :, :, 0], want[1, :, :, 0], want[1, :, :, 3] = (
        exact[0, :, :, 0],
        exact[1, :, :, 0],
        exact[1, :, :, 3],
    )
    torch.testing.assert_close(logs.cpu(), want, **close)


def test_what_is_no_number_marks_its_page(device, make):
    requests = make([70, 40])
    requests.cache.keys[requests.table[0, 1].long(), 3, 1, 5] = torch.nan
    there = requests.to(device)
    index = summarised(there)
    logs = torch.zeros(2, 2, 4, requests.table.shape[1], device=device)
    page_log_masses(there.query, index, there.table, there.full, SCALE, logs)
    marked = (logs == torch.inf).all(2).nonzero().tolist()
    assert marked == [[0, 1, 1]]
    assert not logs.isnan().any()
    broken = there.query.clone()
    broken[1, 0, 0] = torch.nan
    page_log_masses(broken, index, there.table, there.full, SCALE, logs)
    assert (logs[1, 0, 0, : requests.full[1]] == torch.inf).all()
