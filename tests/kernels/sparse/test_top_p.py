"""Top-p without sorting, and the rules of a group, against sorting and counting."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from penstock.kernels.sparse.config import SparseConfig  # noqa: E402
from penstock.kernels.sparse.groups import agree  # noqa: E402
from penstock.kernels.sparse.pages import PageSelection, choose  # noqa: E402
from penstock.kernels.sparse.top_p import top_p  # noqa: E402


def shares(seed: int, *shape: int, sharpness: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator)).softmax(-1)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 300),
    mass=st.floats(0.01, 0.99),
    sharpness=st.sampled_from([0.1, 3.0, 20.0]),
)
def test_top_p_takes_as_many_as_sorting_would(seed, tokens, mass, sharpness):
    weights = shares(seed, 3, tokens, sharpness=sharpness)
    taken = top_p(weights, torch.full((3,), mass))
    sums = weights.sort(-1, descending=True).values.double().cumsum(-1)
    fewest = (sums < mass - 1e-5).sum(-1) + 1
    most = (sums < mass + 1e-5).sum(-1) + 1
    assert ((weights * taken).sum(-1) >= mass - 1e-5).all()
    assert (taken.sum(-1) >= fewest).all()
    assert (taken.sum(-1) <= most).all()


def test_of_equals_only_as_many_as_are_needed_are_taken_from_the_front():
    taken = top_p(torch.full((1, 100), 0.01), torch.tensor([0.295]))
    assert taken[0].nonzero().flatten().tolist() == list(range(30))


def test_no_mass_takes_nothing_too_much_takes_all_and_no_tokens_are_none():
    weights = shares(0, 1, 50)
    assert top_p(weights, torch.tensor([0.0])).sum() == 0
    assert top_p(weights, torch.tensor([2.0])).all()
    assert top_p(torch.zeros(2, 0), torch.zeros(2)).shape == (2, 0)


@pytest.mark.parametrize("group", [1, 2, 5, 16])
@pytest.mark.parametrize("rule", ["union", "cover"])
def test_union_and_cover_give_every_head_its_mass(group, rule):
    weights = shares(group, 3, group, 400)
    mass = torch.linspace(0.5, 0.95, group).expand(3, -1)
    taken = agree(rule, weights, mass)
    assert ((weights * taken[:, None]).sum(-1) >= mass - 1e-5).all()


def test_cover_is_never_larger_than_union_and_close_to_the_best_there_is():
    weights = shares(3, 12, 3, 11, sharpness=1.5)
    mass = torch.full((12, 3), 0.7)
    found, union = agree("cover", weights, mass).sum(-1), agree("union", weights, mass).sum(-1)
    assert (found <= union).all()
    best = [fewest(one, 0.7) for one in weights]
    excess = found - torch.tensor(best)
    assert (excess >= 0).all()
    assert excess.float().mean() <= 0.5
    assert (union - torch.tensor(best)).float().mean() > 1.0


def fewest(weights: torch.Tensor, mass: float) -> int:
    tokens = weights.shape[-1]
    for count in range(1, tokens + 1):
        for picked in itertools.combinations(range(tokens), count):
            if (weights[:, list(picked)].sum(-1) >= mass).all():
                return count
    return tokens


def test_mean_gives_the_mean_head_its_mass_only():
    weights = shares(5, 2, 4, 200)
    taken = agree("mean", weights, torch.full((2, 4), 0.8))
    had = (weights * taken[:, None]).sum(-1)
    assert (had.mean(1) >= 0.8 - 1e-5).all()
    assert had.min() < 0.8


def test_kept_tokens_count_and_unknown_ones_are_never_chosen():
    weights = torch.tensor([[[0.5, 0.3, 0.0, 0.1]]])
    kept = torch.tensor([[False, False, True, False]])
    chosen = choose(SparseConfig(), weights, kept, torch.tensor([[0.99]]))
    assert chosen.tolist() == [[True, True, True, True]]
    assert choose(SparseConfig(), weights, ~kept, torch.tensor([[0.99]])).tolist() == [
        [True, True, False, True]
    ]


@pytest.mark.parametrize("page_tokens", [2, 16, 128])
@pytest.mark.parametrize("tokens", [1, 15, 16, 300])
def test_pages_have_the_mass_and_every_kept_token(tokens, page_tokens):
    weights = shares(tokens, 2, 3, tokens)
    kept = torch.zeros(2, tokens, dtype=torch.bool)
    kept[:, -1] = True
    chosen = choose(SparseConfig(), weights, kept, torch.full((2, 3), 0.8), page_tokens=page_tokens)
    assert chosen[:, -1].all()
    assert ((weights * chosen[:, None]).sum(-1) >= 0.8 - 1e-5).all()
    assert torch.equal(PageSelection.holding(chosen, page_tokens).token_mask(), chosen)


def test_cover_makes_heads_cheap_that_need_little():
    weights = torch.cat([shares(1, 1, 1, 400, sharpness=2.0), shares(2, 1, 1, 400, sharpness=1.0)], 1)
    mass = torch.tensor([[0.7, 0.7]])
    order = weights[0].sum(0).sort(descending=True).indices
    equal_prices = int((weights[0][:, order].cumsum(-1) < 0.7).sum(-1).max()) + 1
    assert int(agree("cover", weights, mass).sum()) < 0.9 * equal_prices
