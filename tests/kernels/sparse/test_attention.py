"""Parts of a softmax add up to the whole."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from penstock.kernels.sparse.attention import attained, attend, logits, merge  # noqa: E402


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(2, 3, 16), torch.randn(2, 50, 16), torch.randn(2, 50, 16)


def test_attention_is_torchs_own():
    query, keys, values = inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=1.0)
    torch.testing.assert_close(attend(query, keys, values).output, expected)


@pytest.mark.parametrize("cut", [0, 1, 25, 50])
def test_two_parts_merge_into_the_whole_even_if_one_is_empty(cut):
    query, keys, values = inputs(cut)
    first = (torch.arange(50) < cut).expand(2, -1)
    whole = attend(query, keys, values)
    merged = merge(attend(query, keys, values, first), attend(query, keys, values, ~first))
    torch.testing.assert_close(merged.output, whole.output)
    torch.testing.assert_close(merged.lse, whole.lse)


def test_a_token_that_is_not_read_does_not_matter_even_if_it_is_nan():
    query, keys, values = inputs()
    read = torch.ones(2, 50, dtype=torch.bool)
    read[:, 7] = False
    expected = attend(query, keys, values, read)
    keys[:, 7], values[:, 7] = torch.nan, torch.nan
    assert torch.equal(attend(query, keys, values, read).output, expected.output)


def test_nothing_at_all_is_zero_and_minus_infinity():
    query, keys, values = inputs()
    empty = attend(query, keys, values, torch.zeros(2, 50, dtype=torch.bool))
    nothing = merge(empty, empty)
    assert (nothing.output == 0).all()
    assert (nothing.lse == -torch.inf).all()


def test_attained_mass_is_the_sum_of_probabilities():
    query, keys, _ = inputs()
    scores = logits(query, keys)
    tokens = torch.zeros(2, 50, dtype=torch.bool)
    tokens[0, 3] = tokens[1, [4, 5]] = True
    found = attained(scores, tokens)
    torch.testing.assert_close(found[0], scores.softmax(-1)[0, :, 3])
    torch.testing.assert_close(found[1], scores.softmax(-1)[1, :, 4:6].sum(-1))
