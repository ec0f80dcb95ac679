"""What every selector promises, on odd shapes and broken keys, and what each one does by its own rule."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from msgspec.structs import replace  # noqa: E402

from penstock.kernels.sparse.attention import attained, attend, logits  # noqa: E402
from penstock.kernels.sparse.config import SparseConfig  # noqa: E402
from penstock.kernels.sparse.hybrid import Hybrid  # noqa: E402
from penstock.kernels.sparse.oracle import Oracle  # noqa: E402
from penstock.kernels.sparse.page_means import PageMeans  # noqa: E402
from penstock.kernels.sparse.pruner import Pruner  # noqa: E402
from penstock.kernels.sparse.quest import Quest  # noqa: E402
from penstock.kernels.sparse.tactic import Tactic  # noqa: E402

CONFIG = SparseConfig(
    recent_tokens=8, cluster_tokens=16, exact_tokens=48, segment_tokens=256, recluster_tokens=128
)
ALL = [
    Oracle(CONFIG),
    Oracle(CONFIG, page_tokens=16),
    Hybrid(CONFIG),
    Hybrid(replace(CONFIG, key_bits=2), page_tokens=16),
    PageMeans(CONFIG),
    Tactic(CONFIG),
    Pruner(CONFIG),
    Quest(CONFIG),
]
NAMES = [f"{one.name} {number}" for number, one in enumerate(ALL)]


def inputs(
    heads: int = 2, group: int = 4, tokens: int = 300, size: int = 64, sharpness: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(heads * 1000 + group * 100 + tokens + size)
    topics = torch.randn(heads, 8, size, generator=generator)
    of = torch.arange(tokens) // 12 % 8
    keys = topics[:, of] + 0.5 * torch.randn(heads, tokens, size, generator=generator)
    values = torch.randn(heads, 8, size, generator=generator)[:, of] + torch.randn(
        keys.shape, generator=generator
    )
    wanted = topics[:, torch.arange(group) % 8]
    query = sharpness * (wanted + torch.randn(heads, group, size, generator=generator)) / size**0.5
    return query, keys, values


@pytest.mark.parametrize("selector", ALL, ids=NAMES)
@pytest.mark.parametrize(
    ("group", "size", "tokens"), [(1, 64, 300), (2, 80, 513), (4, 128, 257), (7, 96, 100), (16, 256, 64)]
)
def test_tokens_that_are_always_read_are_and_the_output_is_finite(selector, group, size, tokens):
    query, keys, values = inputs(3, group, tokens, size)
    indexed = tokens - 20
    found = selector.select(selector.index(keys[:, :indexed], values[:, :indexed]), query, keys, 0.8)
    assert found.tokens.shape == (3, tokens)
    assert found.tokens[:, :4].all()
    assert found.tokens[:, min(indexed, tokens - 8) :].all()
    output = found.attention(query, keys, values)
    assert output.output.shape == query.shape
    assert output.output.isfinite().all()


@pytest.mark.parametrize("selector", ALL, ids=NAMES)
@pytest.mark.parametrize("indexed", [0, 1])
def test_one_token_is_attended_to_exactly(selector, indexed):
    query, keys, values = inputs(tokens=1)
    index = selector.index(keys[:, :indexed], values[:, :indexed])
    found = selector.select(index, query, keys, 0.9)
    assert found.tokens.all()
    torch.testing.assert_close(found.attention(query, keys, values).output, values.expand_as(query))


@pytest.mark.parametrize("selector", ALL, ids=NAMES)
def test_equal_keys_are_no_fault_and_a_choice_is_the_same_each_time(selector):
    query, keys, values = inputs()
    for used in (keys, torch.ones_like(keys)):
        runs = [selector.select(selector.index(used, values), query, used, 0.6) for _ in range(2)]
        assert torch.equal(runs[0].tokens, runs[1].tokens)
        assert runs[0].attention(query, used, values).output.isfinite().all()


@pytest.mark.parametrize("selector", ALL, ids=NAMES)
def test_more_asked_is_more_mass_and_inputs_stay_as_they_were(selector):
    query, keys, values = inputs()
    before = [one.clone() for one in (query, keys, values)]
    index = selector.index(keys, values)
    scores = logits(query, keys)
    had = [
        attained(scores, selector.select(index, query, keys, ask).tokens).mean() for ask in (0.2, 0.6, 0.95)
    ]
    assert had[0] <= had[1] + 1e-6 <= had[2] + 2e-6
    assert all(torch.equal(old, new) for old, new in zip(before, (query, keys, values), strict=True))


def test_everything_asked_is_dense_attention():
    query, keys, values = inputs()
    for selector in (Oracle(CONFIG), Hybrid(CONFIG), Quest(CONFIG)):
        found = selector.select(selector.index(keys, values), query, keys, 1.0)
        torch.testing.assert_close(
            found.attention(query, keys, values).output, attend(query, keys, values).output, atol=2e-3, rtol=0
        )


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("page_tokens", [1, 16])
def test_the_oracle_attains_what_is_asked_and_the_hybrid_nearly_with_as_many_tokens(sharpness, page_tokens):
    query, keys, values = inputs(4, 4, 600, 64, sharpness)
    scores = logits(query, keys)
    oracle, hybrid = (
        made.select(made.index(keys, values), query, keys, 0.8)
        for made in (Oracle(CONFIG, page_tokens=page_tokens), Hybrid(CONFIG, page_tokens=page_tokens))
    )
    assert (attained(scores, oracle.tokens) >= 0.8 - 1e-5).all()
    assert (attained(scores, hybrid.tokens) >= 0.7).all()
    assert attained(scores, hybrid.tokens).mean() >= 0.77
    assert hybrid.tokens.sum() <= 1.15 * oracle.tokens.sum()


def test_the_estimate_of_the_rest_brings_the_output_nearer():
    query, keys, values = inputs(4, 4, 600, sharpness=0.5)
    dense = attend(query, keys, values).output
    errors = [
        (
            made.select(made.index(keys, values), query, keys, 0.6).attention(query, keys, values).output
            - dense
        ).norm()
        for made in (Hybrid(CONFIG), Hybrid(replace(CONFIG, estimate_rest=False)))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_the_coarse_filter_leaves_tokens_unscored_without_losing_the_mass():
    query, keys, values = inputs(2, 2, 1000, 64, sharpness=8.0)
    made = Hybrid(CONFIG)
    found = made.select(made.index(keys, values), query, keys, 0.9)
    assert (found.scored < 700).all()
    assert (attained(logits(query, keys), found.tokens) >= 0.85).all()


def test_an_index_of_a_prefix_is_a_prefix_of_the_index():
    _, keys, values = inputs(2, 1, 600)
    made = Hybrid(CONFIG)
    short, whole = made.index(keys[:, :512], values[:, :512]), made.index(keys, values)
    count = short.clusters.sizes.shape[1]
    assert torch.equal(short.clusters.centroids, whole.clusters.centroids[:, :count])
    assert torch.equal(short.keys.codes, whole.keys.codes[:, :512])
    later = made.index(keys[:, 512:], values[:, 512:])
    assert torch.equal(short.followed_by(later).clusters.order, whole.clusters.order)
    whole.clusters.check_integrity()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_key_is_always_read_and_changes_no_other_choice(broken):
    query, keys, values = inputs()
    made = Hybrid(CONFIG)
    keys[0, 50, 3] = broken
    found = made.select(made.index(keys, values), query, keys, 0.8)
    assert found.tokens[0, 50]
    assert not found.tokens[0].all()
    index = made.index(keys, values)
    assert index.clusters.centroids.isfinite().all()
    sound = found.attention(query, keys, values).output[1]
    assert sound.isfinite().all()


def test_a_broken_query_makes_a_valid_choice():
    query, keys, values = inputs()
    query[0, 1] = torch.nan
    made = Hybrid(CONFIG)
    found = made.select(made.index(keys, values), query, keys, 0.8)
    assert not found.tokens.all()


def test_the_memory_of_an_index_is_what_its_parts_take():
    _, keys, values = inputs(2, 1, 512, 128)
    for bits in (2, 4, 8):
        index = Hybrid(replace(CONFIG, key_bits=bits)).index(keys, values)
        clusters = index.clusters.sizes.numel()
        codes = 2 * 512 * (128 * bits // 8 + 2)
        assert index.nbytes == codes + clusters * (2 * 128 * 2 + 2) + 2 * 512 * 4


def test_quests_bounds_are_never_below_a_score_and_its_budget_is_kept():
    query, keys, values = inputs(2, 3, 310)
    quest = Quest(CONFIG)
    index = quest.index(keys, values)
    bounds = quest.bounds(index, query).repeat_interleave(16, -1)[..., :310]
    assert (bounds >= logits(query, keys) - 1e-4).all()
    found = quest.select(index, query, keys, 0.5)
    assert (found.tokens.sum(1) <= 0.5 * 310 + 32).all()
    assert (found.tokens.sum(1) >= 0.5 * 310 - 32).all()


def test_tactic_reads_whole_clusters_in_the_order_of_their_products():
    query, keys, values = inputs(1, 1, 600)
    tactic = Tactic(replace(CONFIG, sink_tokens=0, recent_tokens=0))
    index = tactic.index(keys, values)
    found = tactic.select(index, query, keys, 0.5).tokens[0]
    ranks = (query @ index.centroids.transpose(1, 2))[0, 0].argsort(descending=True)
    shares = []
    for cluster in ranks.tolist():
        members = index.order[0][index.owner[0] == cluster]
        if len(members):
            shares.append(found[members].float().mean().item())
    partial = [share for share in shares if 0 < share < 1]
    assert shares == sorted(shares, reverse=True)
    assert len(partial) <= 1


def test_the_pruner_stays_within_what_was_proposed():
    query, keys, values = inputs(2, 2, 640)
    pruner = Pruner(CONFIG, proposed_share=0.25)
    proposed = Quest(CONFIG).select(Quest(CONFIG).index(keys, values), query, keys, 0.25).tokens
    found = pruner.select(pruner.index(keys, values), query, keys, 0.99)
    assert not (found.tokens & ~proposed).any()


def test_page_means_read_whole_pages_and_index_only_full_ones():
    query, keys, values = inputs(2, 2, 310)
    made = PageMeans(CONFIG, 16)
    index = made.index(keys, values)
    assert index.tokens == 304
    pages = made.select(index, query, keys, 0.8).tokens[:, :304].unflatten(1, (-1, 16))
    assert torch.equal(pages.any(2), pages.all(2))
