"""Assignment and update against the torch k-means."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.sparse import clusters as reference
from penstock.kernels.sparse import kmeans
from penstock.kernels.triton.kmeans import bounded, nearest, summarise


@pytest.mark.parametrize(
    ("tokens", "count", "size"), [(1, 1, 64), (70, 65, 80), (130, 3, 256), (64, 64, 128), (0, 4, 64)]
)
def test_nearest_is_the_first_of_the_nearest(device, tokens, count, size):
    generator = torch.Generator().manual_seed(tokens)
    # Whole numbers: ties are ties, and no order of summing changes them.
    keys = torch.randint(-2, 3, (2, tokens, size), generator=generator).float()
    centroids = torch.randint(-2, 3, (2, count, size), generator=generator).float()
    centroids[:, -1] = centroids[:, 0]
    found = nearest(keys.to(device), centroids.to(device))
    assert torch.equal(found.cpu().long(), kmeans.nearest(keys, centroids))


def test_a_key_that_is_no_number_gets_a_cluster(device):
    keys = torch.randn(1, 5, 64, device=device)
    keys[0, 2] = torch.nan
    keys[0, 3, 7] = torch.inf
    found = nearest(keys, torch.randn(1, 3, 64, device=device))
    assert ((found >= 0) & (found < 3)).all()


@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (75, 80)])
def test_update_is_the_mean_and_the_spread(device, tokens, size):
    rows, values = torch.randn(2, tokens, size) + 5, torch.randn(2, tokens, size)
    labels = torch.randint(0, 4, (2, tokens)) * 2
    previous = torch.randn(2, 7, size)
    want = reference.Clusters.of(rows, values, labels, 7)
    means, spreads, sizes = (
        part.cpu()
        for part in summarise(rows.to(device), labels.to(device), previous.to(device), spreads=True)
    )
    assert torch.equal(sizes, want.sizes)
    empty = want.sizes == 0
    torch.testing.assert_close(means[~empty], want.centroids[~empty])
    assert torch.equal(means[empty], previous[empty])
    torch.testing.assert_close(spreads, want.spreads)


def test_bounded_clusters_are_those_of_torch(device):
    generator = torch.Generator().manual_seed(5)
    topics = torch.randn(2, 4, 64, generator=generator) * 4
    keys = topics.repeat_interleave(25, 1) + torch.randn(2, 100, 64, generator=generator)
    values = torch.randn(2, 100, 64, generator=generator)
    want = reference.bounded(keys, values, 12, 4, seed=1)
    first = torch.randperm(100, generator=torch.Generator().manual_seed(1))[: 100 // 12]
    found = bounded(keys.to(device), values.to(device), 12, 4, first.to(device))
    found.check_integrity()
    assert found.sizes.max() <= 12
    most = want.sizes.shape[1]
    assert torch.equal(found.order.cpu(), want.order)
    assert torch.equal(found.sizes.cpu()[:, :most], want.sizes)
    assert not found.sizes[:, most:].any()
    for name in ("centroids", "values", "spreads"):
        torch.testing.assert_close(getattr(found, name).cpu()[:, :most], getattr(want, name))


def test_keys_that_are_all_equal_make_one_spot(device):
    keys = torch.ones(1, 40, 64, device=device)
    found = bounded(keys, keys, 8, 3, torch.arange(5, device=device))
    found.check_integrity()
    assert found.sizes.max() <= 8
    assert not found.spreads.any()
