"""Indexes that keep themselves, and layers that decode with them, between steps of an imagined engine."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.serving_stats import ServingStats
from penstock.kernels.triton import choose, decode, index, masses, observe, reference
from penstock.kernels.triton import layers as layers_module
from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.index import MOST_SHARE, DeviceIndex, clusters_within
from penstock.kernels.triton.layers import SparseLayers
from penstock.kernels.triton.step import StepShape
from penstock.kernels.triton.summaries import Summaries, summarise_blocks

HEADS, GROUP, SIZE, N = 1, 2, 16, 4
LAYER = 3


class Engine:
    """One layer's cache and the requests in it."""

    def __init__(self, device, *, blocks=24, pages=16, foreign=False, **config):
        memory = torch.full((blocks, HEADS, N, 2 * SIZE), torch.nan, device=device)
        self.cache = PagedCache(*(part.transpose(1, 2) for part in memory.chunk(2, -1)))
        self.config = ServingConfig(
            **{
                "least_tokens": 0, "recent_tokens": 4, "sink_tokens": 2, "most_share": 1.0, "mass": 0.5,
                "summary_tokens": 2, "summary_rounds": 1, "calibration_share": 0.0, "margin": 0.0,
            }
            | config
        )  # fmt: skip
        self.calibration, self.stats = Calibration(self.config.core()), ServingStats()
        self.layers = SparseLayers(
            self.config, StepShape(3, HEADS, GROUP, SIZE, pages), {LAYER: self.cache}, self.calibration,
            self.stats, scale=SIZE**-0.5, processors=2, foreign=foreign,
        )  # fmt: skip
        self.pages, self.device = pages, device

    def fill(self, blocks, first, keys, values=None):
        """Put keys at positions from ``first`` on, past ``written``."""
        at = torch.arange(first, first + len(keys))
        slots = torch.tensor(blocks)[at // N] * N + at % N
        values = torch.randn(len(keys), SIZE) if values is None else values
        for slot, key, value in zip(slots.tolist(), keys, values, strict=True):
            self.cache.keys[slot // N, slot % N, 0] = key.to(self.device)
            self.cache.values[slot // N, slot % N, 0] = value.to(self.device)
        return slots.to(self.device)

    def write(self, blocks, first, keys):
        padded = torch.nn.functional.pad(self.fill(blocks, first, keys), (0, 2), value=-1)
        self.layers.written(LAYER, padded)

    def decode(self, query, tables, lengths):
        table = torch.zeros(len(tables), self.pages, dtype=torch.int32)
        for row, blocks in zip(table, tables, strict=True):
            row[: len(blocks)] = torch.tensor(blocks)
        lengths = torch.tensor(lengths, dtype=torch.int32)
        out = torch.full_like(query, torch.nan).to(self.device)
        on_device = (one.to(self.device) for one in (query, table, lengths))
        assert self.layers.attend(LAYER, *on_device, out)
        return out.cpu()

    def between_steps(self, requests):
        self.layers.between_steps(requests)
        if self.device.type == "cuda":
            # What the host would have to ask for again is there the next time.
            torch.cuda.synchronize()

    @property
    def counts(self):
        return self.layers._counts.tolist()

    def dense(self, query, blocks, length):
        rows = torch.ones(HEADS, length, dtype=torch.bool)
        table = torch.tensor([blocks], dtype=torch.int32)
        found = reference.attention(
            query, PagedCache(self.cache.keys.cpu(), self.cache.values.cpu()), table, torch.tensor([length]),
            SIZE**-0.5, rows,
        )  # fmt: skip
        return found.output


def keys_of(seed, count, sharp=1.0):
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed)) * sharp


def asked(seed, rows=1):
    return torch.randn(rows, HEADS * GROUP, SIZE, generator=torch.Generator().manual_seed(seed)) * 4


def fresh(cache, block, clusters, rounds):
    found = Summaries.empty(cache, clusters)
    summarise_blocks(cache, torch.tensor([block], device=cache.keys.device), found, rounds)
    return found


def test_the_last_slot_of_a_block_summarises_it_and_no_other_write_does(device):
    engine = Engine(device)
    summaries = engine.layers._indexes[LAYER]
    engine.write([7, 2, 9], 0, keys_of(0, 6))
    assert summaries.known.nonzero().flatten().tolist() == [7]
    engine.write([7, 2, 9], 6, keys_of(1, 1))
    assert summaries.known.nonzero().flatten().tolist() == [7]
    engine.write([7, 2, 9], 7, keys_of(2, 1))
    assert summaries.known.nonzero().flatten().tolist() == [2, 7]
    for block in (2, 7):
        want = fresh(engine.cache, block, summaries.summaries.clusters, 1)
        assert torch.equal(summaries.summaries.means[block], want.means[block])
        assert torch.equal(summaries.summaries.spreads[block], want.spreads[block])
        assert torch.equal(summaries.summaries.values[block], want.values[block])


def test_a_block_that_another_request_fills_is_summarised_as_that_request_left_it(device):
    engine = Engine(device)
    summaries = engine.layers._indexes[LAYER]
    engine.write([5], 0, keys_of(0, N))
    engine.write([5], 0, keys_of(1, N - 1))
    engine.decode(asked(0), [[5]], [N - 1])
    assert engine.counts[0] == 0
    engine.write([5], N - 1, keys_of(2, 1))
    want = fresh(engine.cache, 5, summaries.summaries.clusters, 1)
    assert torch.equal(summaries.summaries.means[5], want.means[5])


def test_pages_are_counted_from_the_front_up_to_the_first_that_has_none(device):
    engine = Engine(device)
    engine.write([1, 2, 3, 4], 0, keys_of(0, 4 * N))
    engine.layers.forget(torch.tensor([3]))
    engine.write([6, 8], 0, keys_of(1, 2 * N))
    engine.decode(asked(0, 3), [[1, 2, 3, 4], [6, 8], []], [4 * N, 2 * N - 1, 0])
    assert engine.counts == [2, 1, 0]


def test_what_comes_from_elsewhere_is_read_in_full_and_summarised_as_it_is_decoded(device, monkeypatch):
    monkeypatch.setattr(layers_module, "CATCH_UP_PAGES", 4)
    engine = Engine(device, foreign=True)
    blocks = list(range(1, 8))
    engine.fill(blocks, 0, keys_of(0, 7 * N - 1))
    query = asked(1)
    dense = engine.dense(query, blocks, 7 * N - 1)
    seen = []
    for _ in range(3):
        out = engine.decode(query, [blocks], [7 * N - 1])
        seen.append(engine.counts[0])
        if seen[-1] == 0:
            torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)
    assert seen == [0, 4, 6]
    summaries = engine.layers._indexes[LAYER]
    want = fresh(engine.cache, 5, summaries.summaries.clusters, 1)
    assert torch.equal(summaries.summaries.means[5], want.means[5])


def test_whoever_is_not_told_of_foreign_blocks_never_reads_a_summary_that_is_not_there(device):
    engine = Engine(device)
    blocks = [3, 1, 2]
    engine.fill(blocks, 0, keys_of(0, 3 * N))
    query = asked(2)
    torch.testing.assert_close(
        engine.decode(query, [blocks], [3 * N]), engine.dense(query, blocks, 3 * N), rtol=1e-4, atol=1e-5
    )


def test_steps_of_any_size_share_one_memory_and_larger_ones_are_left_to_others(device):
    engine = Engine(device, mass=1.0)
    tables = [[1, 2], [3], [4, 5, 6]]
    lengths = [2 * N, 3, 2 * N + 1]
    for seed, (blocks, length) in enumerate(zip(tables, lengths, strict=True)):
        engine.write(blocks, 0, keys_of(seed, length))
    query = asked(3, 3)
    dense = torch.cat([engine.dense(query[i : i + 1], tables[i], lengths[i]) for i in range(3)])
    for count in (3, 1):
        out = engine.decode(query[:count], tables[:count], lengths[:count])
        torch.testing.assert_close(out, dense[:count], rtol=1e-4, atol=1e-5)
    four = torch.zeros(4, engine.pages, dtype=torch.int32, device=device)
    nothing = torch.zeros(4, HEADS * GROUP, SIZE, device=device)
    assert not engine.layers.attend(LAYER, nothing, four, four[:, 0], nothing)


def test_memory_of_a_step_is_bounded_by_its_requests(device, monkeypatch):
    most = Engine(device).layers.step_bytes
    monkeypatch.setattr(layers_module, "MOST_STEP_BYTES", most - 1)
    engine = Engine(device)
    assert engine.layers.requests == 2
    assert engine.layers.step_bytes < most


def test_a_sample_is_the_exact_mass_of_what_was_read_and_moves_the_margin(device):
    engine = Engine(device, calibration_share=1.0, mass=0.8, margin=-2.0)
    blocks = list(range(1, 13))
    engine.write(blocks, 0, keys_of(4, 12 * N - 2))
    length = 12 * N - 2
    query = asked(5)
    engine.between_steps(1)
    before = engine.layers._wanted.item()
    engine.decode(query, [blocks], [length])
    taken = engine.layers._step_of(1).reads.taken[0, :12].bool().cpu()
    engine.between_steps(0)
    engine.between_steps(0)
    table = torch.tensor([blocks], dtype=torch.int32)
    here = PagedCache(engine.cache.keys.cpu(), engine.cache.values.cpu())
    logs = reference.exact_log_masses(query, here, table, torch.tensor([length]), SIZE**-0.5)[0, 0]
    want = (logs.softmax(-1) * taken).sum(-1)
    assert 0 < taken.sum() < 12
    found = engine.stats.snapshot()
    assert found.measurements == GROUP
    attained = engine.calibration.attained(LAYER, (0.0, 0.99))
    assert attained == pytest.approx(sorted(want.tolist()), abs=1e-5)
    assert engine.layers._wanted.item() != before
    assert engine.layers._wanted.item() == pytest.approx(engine.calibration.ask(LAYER), abs=1e-6)


def test_every_few_steps_a_row_of_a_layer_whose_margin_is_not_settled_is_sampled(device, monkeypatch):
    engine = Engine(device, calibration_share=1.0)
    asked_for = []
    monkeypatch.setattr(
        type(engine.layers._sample), "ask", lambda sample, layer, row: asked_for.append((layer, row))
    )
    for _ in range(2 * layers_module.SAMPLE_STEPS + 1):
        engine.between_steps(2)
    engine.between_steps(0)
    assert len(asked_for) == 3
    assert {layer for layer, _ in asked_for} == {LAYER}
    assert {row for _, row in asked_for} <= {0, 1}


def test_a_dense_step_leaves_no_sample(device):
    engine = Engine(device, calibration_share=1.0)
    for _ in range(3):
        engine.between_steps(1)
    assert engine.layers._sampled_at == 1
    assert engine.stats.snapshot().measurements == 0


def test_totals_are_told_every_so_many_steps(device, monkeypatch):
    monkeypatch.setattr(layers_module, "FETCH_STEPS", 2)
    engine = Engine(device, least_tokens=2 * N)
    blocks = list(range(1, 9))
    engine.write(blocks, 0, keys_of(6, 8 * N, sharp=2.0))
    pages = 0
    for _ in range(2):
        engine.decode(asked(7, 3), [blocks, [9], []], [8 * N, 3, 0])
        pages += int(engine.layers._step_of(3).reads.lengths[0]) // N
        assert engine.stats.selections == 0
        engine.between_steps(3)
    engine.between_steps(3)
    found = engine.stats.snapshot()
    assert found.selections == 2
    assert found.layer_pages == {LAYER: (pages, 16)}
    assert found.dense == {"short context": 2}


def test_the_host_reads_nothing_back(device, monkeypatch, no_reading):
    if device.type != "cpu":
        pytest.skip("the kernels are replaced")
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    engine = Engine(device, foreign=True)
    kernels = {
        masses: ("_masses", "_exact"),
        choose: ("_choose",),
        decode: ("_decode", "_estimate", "_merge"),
        index: ("_written", "_count", "_catch_up"),
        observe: ("_observe",),
    }
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorded())
    query, table = asked(0), torch.zeros(1, engine.pages, dtype=torch.int32)
    lengths, slots, out = torch.tensor([30], dtype=torch.int32), torch.tensor([4]), torch.empty(1, 2, SIZE)
    with no_reading:
        engine.layers.written(LAYER, slots)
        engine.layers.attend(LAYER, query, table, lengths, out)
        first, grids[:] = list(grids), []
        engine.layers.written(LAYER, slots.fill_(-1))
        engine.layers.attend(LAYER, query, table, lengths.fill_(0), out)
    assert len(first) == 10
    assert grids == first


@pytest.mark.parametrize(("size", "tokens", "dtype"), [(64, 16, torch.bfloat16), (128, 16, torch.float16)])
def test_the_index_stays_within_its_share_of_the_cache(size, tokens, dtype):
    part = torch.zeros(5, tokens, 2, size, dtype=dtype)
    cache = PagedCache(part, part)
    clusters = clusters_within(cache, 4)
    kept = DeviceIndex(cache, clusters, 1, torch.zeros(5, dtype=torch.uint8))
    assert 2 < clusters <= 4
    assert kept.summaries.nbytes <= MOST_SHARE * 2 * part.nbytes
    assert clusters_within(cache, 16) == 1
