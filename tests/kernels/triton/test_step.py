"""A whole step against the reference, and what a captured graph needs."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.triton import reference
from penstock.kernels.triton.step import SparseStep, StepShape, splits_for
from penstock.kernels.triton.summaries import Summaries, summarise_blocks

CONFIG = ServingConfig(least_tokens=0, recent_tokens=20, most_share=1.0, sink_tokens=4)


def prepared(requests, device, config=CONFIG):
    there = requests.to(device)
    index = Summaries.empty(there.cache, 4)
    rows = zip(there.table, requests.full.tolist(), strict=True)
    summarise_blocks(there.cache, torch.cat([row[:count] for row, count in rows]), index, 1)
    _, heads, size = requests.query.shape
    shape = StepShape(
        len(requests.lengths), there.cache.heads, heads // there.cache.heads, size, requests.table.shape[1]
    )
    return there, index, SparseStep(config, shape, there.cache, tail_pages=3, processors=4)


def run(there, index, step, wanted):
    out = torch.full_like(there.query, torch.nan)
    mass = torch.tensor([wanted], device=out.device)
    return step.run(there.query, there.cache, index, there.table, there.lengths, there.full, mass, out)


def test_a_step_is_the_choice_the_attention_and_the_estimate(device, make):
    requests = make([185, 0, 17], heads=1, sharp=8.0)
    there, index, step = prepared(requests, device)
    out = run(there, index, step, 0.8).cpu()
    taken, logs = step.reads.taken.cpu().bool(), step.logs.cpu()
    count = 12
    kept = torch.tensor([page in (0, 10, 11) for page in range(count)])
    assert torch.equal(taken[0, :count], reference.chosen(logs[0, 0, :, :count], kept, 0.8))
    assert 3 < taken[0, :count].sum() < count
    pages = torch.arange(requests.table.shape[1])
    taken &= pages * 16 < requests.lengths[:, None]
    unread = ~taken & (pages < requests.full[:, None])
    rest = logs.masked_fill(~unread[:, None, None], -torch.inf)
    scale = requests.query.shape[-1] ** -0.5
    want = reference.attention(
        requests.query, requests.cache, requests.table, requests.lengths, scale,
        taken.repeat_interleave(16, 1), (rest, index.values.cpu()),
    )  # fmt: skip
    torch.testing.assert_close(out, want.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.lse.cpu(), want.lse, rtol=1e-4, atol=1e-4)
    assert not out[1].any()


def test_the_whole_mass_is_dense_attention(device, make):
    requests = make([50], heads=2, group=1)
    out = run(*prepared(requests, device), 1.0).cpu()
    everything = torch.ones(2, 50, dtype=torch.bool)
    want = reference.attention(
        requests.query, requests.cache, requests.table, requests.lengths, 64**-0.5, everything
    )
    torch.testing.assert_close(out, want.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "size", "block_tokens", "message"),
    [
        (ServingConfig(group_rule="union"), 64, 16, "given 'union', allowed on a GPU: 'ranked'"),
        (CONFIG, 320, 16, "given 320, allowed: at most 256"),
        (CONFIG, 64, 256, "given 256, allowed: at most 128"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(make, config, size, block_tokens, message):
    requests = make([1], size=size, block_tokens=block_tokens)
    with pytest.raises(ValueError, match=message):
        SparseStep(config, StepShape(1, 2, 4, size, 2), requests.cache, tail_pages=1, processors=1)


def test_the_host_reads_nothing_back(make, monkeypatch, no_reading):
    pytest.importorskip("triton")
    from penstock.kernels.triton import choose, decode, masses

    requests = make([40], heads=1)
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    there, index, step = prepared(requests, torch.device("cpu"))
    launched = {
        masses: ("_masses", "_exact"),
        choose: ("_choose",),
        decode: ("_decode", "_estimate", "_merge"),
    }
    for module, names in launched.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorded())
    arguments = (there.query, there.cache, index, there.table)
    wanted, out = torch.tensor([0.9]), torch.empty_like(there.query)
    with no_reading:
        step.run(*arguments, there.lengths, there.full, wanted, out)
        first, grids[:] = list(grids), []
        step.run(*arguments, there.lengths.fill_(3), there.full.zero_(), wanted, out)
    assert len(first) == 6
    assert grids == first


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths(device, make):
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    requests = make([185, 90], dtype=torch.bfloat16)
    there, index, step = prepared(requests, device)
    out, wanted = torch.empty_like(there.query), torch.tensor([0.8], device=device)
    full = there.full
    arguments = (there.query, there.cache, index, there.table, there.lengths, full, wanted, out)
    step.run(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(*arguments)
    there.lengths.copy_(torch.tensor([33, 0]))
    full.copy_(torch.tensor([2, 0]))
    graph.replay()
    replayed = out.clone()
    step.run(*arguments)
    assert torch.equal(replayed, out)
    assert not out[1].any()


@pytest.mark.parametrize(
    ("rows", "tokens", "processors", "splits"),
    [(8, 131072, 132, 33), (128, 131072, 132, 3), (8, 100, 132, 1), (1, 2**20, 132, 64), (1000, 10**6, 4, 1)],
)
def test_splits_fill_the_device_and_stay_large(rows, tokens, processors, splits):
    assert splits_for(rows, tokens, processors) == splits
