"""k-means, clusters and quantised keys, against what they summarise."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from penstock.kernels.sparse import kmeans  # noqa: E402
from penstock.kernels.sparse.clusters import Clusters, bounded, by_kmeans, log_masses  # noqa: E402
from penstock.kernels.sparse.quantised import QuantisedKeys, rotation  # noqa: E402


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_kmeans_finds_groups_that_are_far_apart_and_is_the_same_each_time():
    group = torch.arange(60) % 3
    keys = 0.01 * rows(1, 2, 60, 8) + 10.0 * rows(2, 1, 3, 8)[:, group]
    # Of three keys that are drawn, two may be of one group; twice as many clusters find all groups.
    found = kmeans.assign(keys, 12, 10, seed=0)
    assert torch.equal(found, kmeans.assign(keys, 12, 10, seed=0))
    for head in found:
        assert all(len(set(group[head == label].tolist())) <= 1 for label in range(12))


def test_an_iteration_of_kmeans_is_that_of_the_definition():
    keys = rows(3, 1, 40, 4)
    first = torch.randperm(40, generator=torch.Generator().manual_seed(5))[:6]
    centroids = keys[0, first]
    for _ in range(2):
        owner = torch.cdist(keys[0], centroids).argmin(1)
        centroids = torch.stack([keys[0][owner == label].mean(0) for label in range(6)])
    expected = torch.cdist(keys[0], centroids).argmin(1)
    assert torch.equal(kmeans.assign(keys, 6, 3, seed=5)[0], expected)


@pytest.mark.parametrize("make", [by_kmeans, bounded])
@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 3),
    tokens=st.integers(0, 200),
    size=st.sampled_from([4, 16, 32]),
    equal=st.booleans(),
)
def test_every_token_is_in_one_cluster_of_which_the_means_are_known(make, heads, tokens, size, equal):
    keys = torch.ones(heads, tokens, 8) if equal else rows(tokens, heads, tokens, 8)
    values = rows(tokens + 1, heads, tokens, 8)
    found = make(keys, values, size, 5, 0)
    found.check_integrity()
    if make is bounded:
        assert found.sizes.max() <= size
    for head in range(heads):
        for cluster in found.owner[head].unique().tolist():
            members = found.order[head][found.owner[head] == cluster]
            centroid = keys[head, members].mean(0)
            torch.testing.assert_close(found.centroids[head, cluster], centroid)
            torch.testing.assert_close(found.values[head, cluster], values[head, members].mean(0))
            spread = (keys[head, members] - centroid).square().mean()
            torch.testing.assert_close(found.spreads[head, cluster], spread)


def test_a_token_that_is_twice_in_the_order_is_found():
    found = by_kmeans(rows(0, 1, 32, 4), rows(1, 1, 32, 4), 8, 3, 0)
    found.order[0, 0] = found.order[0, 1]
    with pytest.raises(AssertionError, match="miss or repeat"):
        found.check_integrity()


def test_clusters_of_what_follows_come_after():
    keys, values = rows(0, 2, 96, 4), rows(1, 2, 96, 4)
    both = bounded(keys[:, :64], values[:, :64], 16, 3, 0).followed_by(
        bounded(keys[:, 64:], values[:, 64:], 16, 3, 0)
    )
    both.check_integrity()
    labels = torch.empty_like(both.order).scatter_(1, both.order, both.owner)
    again = Clusters.of(keys, values, labels, both.sizes.shape[1])
    torch.testing.assert_close(again.centroids, both.centroids)
    assert labels[:, :64].max() < labels[:, 64:].min()


@pytest.mark.parametrize("deviation", [0.0, 0.5, 2.0, 6.0, 12.0])
def test_log_masses_are_those_of_normal_scores_narrow_or_wide(deviation):
    scores = 1.0 + deviation * rows(int(deviation), 4000, 32)
    true = scores.logsumexp(-1)
    found = log_masses(torch.tensor(1.0), torch.tensor(deviation), torch.tensor(32.0))
    # For few of them the largest is below its limit for many: 2.07 instead of 2.63 deviations of 32.
    assert abs(found - true.mean()) < 0.1 + 0.6 * deviation
    gaussian = 1.0 + torch.tensor(32.0).log() + deviation**2 / 2
    if deviation > 4:
        assert abs(found - true.mean()) < abs(gaussian - true.mean()) / 2
    assert log_masses(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0)) == -torch.inf


@pytest.mark.parametrize("size", [63, 64, 80, 128, 256])
@pytest.mark.parametrize(("bits", "most"), [(2, 0.40), (4, 0.12), (8, 0.013)])
def test_quantised_keys_give_products_without_bias_and_with_small_errors(bits, most, size):
    keys = rows(size, 1, 400, size) * rows(1, 1, 400, 1).exp()
    queries = rows(2, 200, size)
    kept = QuantisedKeys.of(keys @ rotation(size, 0), bits)
    assert kept.codes.dtype == torch.uint8
    assert kept.codes.shape[-1] == -(-size * bits // 8)
    error = (queries @ rotation(size, 0)) @ kept.restored()[0].T - queries @ keys[0].T
    relative = error / keys[0].norm(dim=-1)
    assert relative.square().mean().sqrt() < most
    # A key's product with itself is right; rounding alone would shrink it.
    own = ((keys @ rotation(size, 0)) * kept.restored()).sum(-1) / keys.square().sum(-1)
    torch.testing.assert_close(own, torch.ones_like(own), atol=2e-3, rtol=0)


def test_a_key_at_its_centroid_is_restored_as_that():
    kept = QuantisedKeys.of(torch.zeros(1, 5, 64), 4)
    assert (kept.restored() == 0).all()


def test_a_rotation_keeps_products_and_is_the_same_each_time():
    turn = rotation(80, 3)
    torch.testing.assert_close(turn @ turn.T, torch.eye(80), atol=1e-5, rtol=0)
    rotation.cache_clear()
    assert torch.equal(turn, rotation(80, 3))
