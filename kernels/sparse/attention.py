"""Exact attention over chosen tokens, and the operator that merges parts of one softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """Attention over some of the tokens: what a softmax over them alone gives, and how much they weigh.

    ``output`` is [H, G, D], ``lse`` the log of the sum of exponentials, [H, G]; no token at all is 0 and
    -inf.
    """

    output: torch.Tensor
    lse: torch.Tensor


def logits(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores of ``query`` [H, G, D] on ``keys`` [H, n, D], float32 [H, G, n]."""
    return query.float() @ keys.float().transpose(1, 2)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor | None = None
) -> Partial:
    """Attention of ``query`` [H, G, D] over ``tokens`` (bool [H, n]) of ``keys`` and ``values`` [H, n, D]."""
    scores = logits(query, keys)
    if tokens is None:
        return weighted(scores, values)
    # A token that is not read must not be multiplied either: zero times NaN is NaN.
    read = torch.where(tokens[:, :, None], values, torch.zeros((), dtype=values.dtype))
    return weighted(scores.masked_fill(~tokens[:, None], -torch.inf), read)


def weighted(scores: torch.Tensor, values: torch.Tensor) -> Partial:
    """Softmax of ``scores`` [H, G, n] over ``values`` [H, n, D]; -inf leaves a token out."""
    lse = scores.logsumexp(-1)
    # With every score -inf, so is the sum: any finite number in its place makes all weights zero.
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return Partial(weights @ values.float(), lse)


def merge(first: Partial, second: Partial) -> Partial:
    """The attention over the tokens of both; associative and commutative (as in FlashInfer)."""
    lse = torch.logaddexp(first.lse, second.lse)
    base = lse.nan_to_num(neginf=0.0)
    shares = [(part.lse - base).exp()[..., None] for part in (first, second)]
    return Partial(first.output * shares[0] + second.output * shares[1], lse)


def attained(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The share of softmax mass that ``tokens`` (bool [H, n]) have, by exact ``scores`` [H, G, n]; [H, G]."""
    return (scores.softmax(-1) * tokens[:, None]).sum(-1)
