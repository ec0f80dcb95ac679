"""Pages for a decode step: the mass they have, whose blocks they are, and when they are not chosen at all."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.benchmarks.sparse_keys import made_up
from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.fallback import Reason
from penstock.kernels.sparse.head_rows import Read, head_rows
from penstock.kernels.sparse.page_choice import exact_log_masses, page_shares
from penstock.kernels.sparse.page_clusters import PageClusters
from penstock.kernels.sparse.paged_decode import PagedDecode
from penstock.kernels.sparse.paged_keys import Keys
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.serving_stats import ServingStats

PAGE = 32


class Cache(Keys):
    """Keys of a pool of blocks; counts the blocks that are read."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys
        self.read_blocks: list[int] = []

    def read(self, blocks: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        self.read_blocks += blocks.tolist()
        return self.keys[heads].index_select(1, blocks)


def decoding(cache: Cache, **keys) -> tuple[PagedDecode, ServingStats]:
    config = ServingConfig(**{"least_tokens": 64, "dense_layers": 0, "most_share": 0.95, **keys})
    heads, blocks, page, size = cache.keys.shape
    index = BlockIndex(
        blocks=blocks,
        heads=heads,
        block_tokens=page,
        head_size=size,
        summary_tokens=config.summary_tokens,
        rounds=config.summary_rounds,
    )
    stats = ServingStats()
    return PagedDecode(config, 0, index, cache, Calibration(config.core()), stats), stats


def placed(keys: torch.Tensor, blocks: list[int], pool: int, foreign: float = math.nan) -> Cache:
    """``keys`` [H, n, D] in ``blocks`` of a pool in which all else is ``foreign``."""
    heads, tokens, size = keys.shape
    cache = torch.full((heads, pool, PAGE, size), foreign)
    slots = torch.tensor(blocks)[torch.arange(tokens) // PAGE] * PAGE + torch.arange(tokens) % PAGE
    cache.view(heads, -1, size)[:, slots] = keys
    return Cache(cache)


def exact_shares(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    scores = (query @ keys.transpose(1, 2)).softmax(-1)
    pages = -(-keys.shape[1] // PAGE)
    return (
        torch.nn.functional.pad(scores, (0, pages * PAGE - keys.shape[1]))
        .unflatten(-1, (pages, PAGE))
        .sum(-1)
    )


@pytest.mark.parametrize("rule", ["ranked", "cover", "union"])
@pytest.mark.parametrize("level", ["mid", "peaky"])
def test_chosen_pages_attain_the_mass_and_leave_pages_out(level, rule):
    layer = made_up(level, seed=3, tokens=2048, steps=40, heads=2)
    blocks = torch.randperm(80)[:64]
    cache = placed(layer.keys, blocks.tolist(), 80)
    decode, stats = decoding(cache, mass=0.8, group_rule=rule, calibration_share=0.2)
    attained = []
    for query, keys, _ in layer.steps():
        tokens = keys.shape[1]
        pages = decode.pages(query, blocks[: -(-tokens // PAGE)], tokens, PAGE)
        assert pages is not None
        assert pages[:, -1].all()
        attained += (exact_shares(query, keys) * pages[:, None]).sum(-1).flatten().tolist()
    enough = sum(mass >= 0.8 for mass in attained[len(attained) // 4 :]) / (0.75 * len(attained))
    assert enough >= 0.95
    now = stats.snapshot()
    assert now.selected_share < 0.85
    assert now.mass_p50 is not None
    assert now.mass_p50 >= 0.8
    assert set(cache.read_blocks) <= set(blocks.tolist())


def test_a_budget_is_read_whatever_mass_it_has():
    layer = made_up("flat", seed=1, tokens=2048, steps=3, heads=2)
    decode, stats = decoding(placed(layer.keys, list(range(64)), 64), budget=0.25, calibration_share=1.0)
    for query, keys, _ in layer.steps():
        pages = decode.pages(query, torch.arange(64), keys.shape[1], PAGE)
        assert pages is not None
        assert pages.sum(1).tolist() == [16, 16]
        assert pages[:, 0].all()
        assert pages[:, -2:].all()
    assert stats.snapshot().mass_p50 < 0.9


def test_foreign_blocks_are_never_read_nor_chosen_and_broken_keys_always_are():
    layer = made_up("peaky", seed=1, tokens=1000, steps=4, heads=2)
    blocks = torch.randperm(64)[:32]
    keys = layer.keys.clone()
    keys[1, 300] = math.nan
    cache = placed(keys, blocks.tolist(), 64)
    decode, _ = decoding(cache, mass=0.5)
    for query in layer.queries:
        pages = decode.pages(query, blocks, 1000, PAGE)
        assert pages is not None
        assert pages[1, 300 // PAGE]
        assert not pages[0].all()
        assert set(cache.read_blocks) <= set(blocks.tolist())


def test_a_block_that_was_handed_out_again_is_summarised_again():
    layer = made_up("peaky", seed=1, tokens=640, steps=2, heads=1)
    other = made_up("peaky", seed=2, tokens=640, steps=2, heads=1)
    blocks = torch.arange(20)
    cache = placed(layer.keys, blocks.tolist(), 20)
    decode, _ = decoding(cache, mass=0.5, calibration_share=0.0)
    decode.pages(layer.queries[0], blocks, 640, PAGE)
    cache.keys = placed(other.keys, blocks.tolist(), 20).keys
    decode.index.forget(blocks)
    again = decode.pages(other.queries[0], blocks, 640, PAGE)
    fresh, _ = decoding(cache, mass=0.5, calibration_share=0.0)
    expected = fresh.pages(other.queries[0], blocks, 640, PAGE)
    assert again is not None
    assert expected is not None
    assert torch.equal(again, expected)


def test_shared_blocks_are_summarised_once():
    layer = made_up("mid", seed=1, tokens=640, steps=2, heads=1)
    cache = placed(layer.keys, list(range(20)), 20)
    decode, stats = decoding(cache, calibration_share=0.0)
    decode.pages(layer.queries[0], torch.arange(20), 640, PAGE)
    decode.pages(layer.queries[1], torch.arange(12), 384, PAGE)
    assert stats.snapshot().index_blocks == 19


@pytest.mark.parametrize(
    ("keys", "tokens", "reason"),
    [
        ({"least_tokens": 641}, 640, Reason.SHORT_CONTEXT),
        ({"dense_layers": 1}, 640, Reason.FIRST_LAYERS),
        ({"mass": 1.0}, 640, Reason.NOTHING_SAVED),
    ],
)
def test_dense_for_a_reason_that_is_counted(keys, tokens, reason):
    layer = made_up("peaky", seed=1, tokens=640, steps=1, heads=1)
    decode, stats = decoding(placed(layer.keys, list(range(20)), 20), **keys)
    assert decode.pages(layer.queries[0], torch.arange(20), tokens, PAGE) is None
    assert stats.snapshot().dense == {reason.value: 1}
    assert stats.snapshot().selections == 0


def test_a_layer_that_saves_nothing_is_asked_less_and_less_often():
    keys = torch.zeros(1, 640, 32)
    decode, stats = decoding(
        placed(keys, list(range(20)), 20), mass=0.9, most_share=0.5, calibration_share=0.0
    )
    query = torch.ones(1, 1, 32)
    assert all(decode.pages(query, torch.arange(20), 640, PAGE) is None for _ in range(100))
    assert stats.snapshot().selections == 7  # after 1, 2, 4 ... steps
    assert stats.snapshot().dense == {Reason.NOTHING_SAVED.value: 93}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_reads_everything(bad):
    layer = made_up("peaky", seed=1, tokens=640, steps=1, heads=1)
    decode, _ = decoding(placed(layer.keys, list(range(20)), 20), calibration_share=1.0)
    query = layer.queries[0].clone()
    query[0, :, 0] = bad
    assert decode.pages(query, torch.arange(20), 640, PAGE) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(65, 400), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.data())
def test_pages_of_any_length_are_valid_and_have_what_is_always_read(tokens, group, heads, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    keys = torch.randn(heads, tokens, 16, generator=random) * data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    count = -(-tokens // PAGE)
    cache = placed(keys, list(range(count)), count, foreign=0.0)
    decode, _ = decoding(cache, least_tokens=0, sink_tokens=4, recent_tokens=64, calibration_share=1.0)
    query = torch.randn(heads, group, 16, generator=random)
    pages = decode.pages(query, torch.arange(count), tokens, PAGE)
    if pages is not None:
        assert pages.shape == (heads, count)
        assert pages[:, 0].all()
        assert pages[:, (tokens - 64) // PAGE :].all()


def test_clusters_partition_pages_and_their_spread_only_falls_with_rounds():
    keys = torch.randn(2, 5, PAGE, 8)
    runs, refined = PageClusters.of(keys, 4, 0), PageClusters.of(keys, 4, 3)
    for found in (runs, refined):
        assert torch.equal(found.sizes.sum(-1), torch.full((2, 5), float(PAGE)))
        whole = (found.means * found.sizes[..., None]).sum(-2) / PAGE
        torch.testing.assert_close(whole, keys.mean(-2))
    assert ((refined.spreads * refined.sizes).sum(-1) <= (runs.spreads * runs.sizes).sum(-1) + 1e-5).all()


def test_estimates_are_exact_where_a_cluster_is_a_single_key():
    keys = torch.randn(2, 3, PAGE, 8)
    query = torch.randn(2, 4, 8)
    estimated = PageClusters.of(keys, PAGE, 1).log_page_masses(query)
    torch.testing.assert_close(estimated, exact_log_masses(query, keys, PAGE))


def test_exact_masses_end_at_the_tail():
    keys = torch.randn(1, 3, PAGE, 8)
    query = torch.randn(1, 2, 8)
    found = page_shares(exact_log_masses(query, keys, 5))
    torch.testing.assert_close(found, exact_shares(query, keys.flatten(1, 2)[:, : 2 * PAGE + 5]))


def test_rows_list_own_blocks_in_order_with_the_partial_one_last():
    pages = torch.tensor([[True, False, True], [False, False, True]])
    reads = [Read(torch.tensor([7, 3, 5]), pages, 9), Read(torch.tensor([1, 2]), None, 1)]
    table, lengths = head_rows(reads, heads=2, block_tokens=PAGE, stride=10)
    assert table.tolist() == [[70, 50], [51, 0], [10, 20], [11, 21]]
    assert lengths.tolist() == [PAGE + 9, 9, PAGE + 1, PAGE + 1]


def test_configuration_says_what_is_allowed():
    with pytest.raises(ValueError, match="mass: given 0, allowed: above 0, at most 1"):
        ServingConfig(mass=0)
    with pytest.raises(msgspec.ValidationError, match="summary_tokens"):
        msgspec.convert({"summary_tokens": 0}, ServingConfig)
    assert ServingConfig(mass=0.7).core().mass == 0.7
