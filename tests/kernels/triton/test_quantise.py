"""Codes and scores against ``QuantisedKeys``."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.sparse.quantised import QuantisedKeys
from penstock.kernels.triton.quantise import quantise, score_keys


@pytest.mark.parametrize(("bits", "tokens", "size"), [(4, 33, 64), (2, 3, 80), (8, 1, 256), (4, 5, 97)])
def test_codes_are_those_of_torch(device, bits, tokens, size):
    rows = torch.randn(2, tokens, size, generator=torch.Generator().manual_seed(bits))
    rows[1, 0] = 0
    want, found = QuantisedKeys.of(rows, bits), quantise(rows.to(device), bits)
    assert torch.equal(found.codes.cpu(), want.codes)
    torch.testing.assert_close(found.factors.cpu(), want.factors)


@pytest.mark.parametrize(("bits", "group", "size"), [(4, 4, 64), (2, 1, 128), (8, 16, 80)])
def test_scores_of_near_clusters_alone(device, bits, group, size):
    generator = torch.Generator().manual_seed(group)
    rows, tokens, clusters, positions = 4, 70, 6, 90
    query = torch.randn(rows, group, size, generator=generator)
    keys = QuantisedKeys.of(torch.randn(rows, tokens, size, generator=generator), bits)
    owner = torch.randint(0, clusters, (rows, tokens), generator=generator).sort(1).values
    order = torch.stack([torch.randperm(positions, generator=generator)[:tokens] for _ in range(rows)])
    near = torch.rand(rows, clusters, generator=generator) < 0.5
    near[0] = False
    products = torch.randn(rows, group, clusters, generator=generator)
    lengths = torch.tensor([tokens, 41], dtype=torch.int32)
    # Beyond a request's tokens there may be anything.
    keys.factors[2:, 41:] = torch.nan
    want = torch.full((rows, group, positions), -torch.inf)
    for row in range(rows):
        used = torch.arange(tokens) < lengths[row // 2]
        at = (near[row, owner[row]] & used).nonzero()[:, 0]
        scores = query[row] @ keys.restored()[row, at].T + products[row][:, owner[row, at]]
        want[row][:, order[row, at]] = scores
    found = torch.full_like(want, -torch.inf).to(device)
    on_device = QuantisedKeys(keys.codes.to(device), keys.factors.to(device), bits, size)
    score_keys(
        query.to(device), on_device, owner.int().to(device), order.int().to(device),
        near.to(device, torch.uint8), products.to(device), lengths.to(device), found,
    )  # fmt: skip
    torch.testing.assert_close(found.cpu(), want, rtol=1e-5, atol=1e-5)
