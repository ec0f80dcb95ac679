"""How the query heads that share a KV head agree on the tokens that it reads."""

from __future__ import annotations

import torch

from penstock.kernels.sparse.config import GroupRule
from penstock.kernels.sparse.top_p import top_p

ROUNDS = 6
SPEED = 0.7


def agree(rule: GroupRule, weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Tokens bool [H, n] for ``weights`` [H, G, n] (estimated shares of mass) and the ``mass`` [H, G] to
    reach.

    ``union``: what any head needs (as in Tactic). ``mean``: the mean head reaches the mean mass, so
    single ones may miss it. ``cover``: every head reaches its mass, with close to the fewest tokens.
    ``ranked``: one order for all, by the sum of the weights, followed until every head has its mass; a sort
    and a running sum, for tables of few entries where ``cover`` takes longer than it saves.
    """
    if weights.shape[1] == 1:
        return top_p(weights[:, 0], mass[:, 0])
    match rule:
        case "union":
            return top_p(weights, mass).any(1)
        case "mean":
            return top_p(weights.mean(1), mass.mean(1))
        case "cover":
            return _cover(weights, mass)
        case "ranked":
            goal = torch.minimum(mass, weights.sum(-1))
            return _reach(weights, weights.sum(1), goal) & (goal > 0).any(1, keepdim=True)


def _cover(weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Close to the fewest tokens with which every head has its mass.

    As a linear programme, taking a token pays where its weights, each times a price of its head, sum to more
    than one; heads that have too much become cheaper. The fewest tokens at those prices are those of the
    largest sums, and at most G fewer than the best whole choice. Whatever the prices, the last step makes
    every head reach its mass. The union stands where it is smaller, as it is for heads that look at different
    tokens.
    """
    floor = torch.finfo(weights.dtype).tiny
    # Nothing can have more than the whole.
    goal = torch.minimum(mass, weights.sum(-1)).clamp(min=floor)
    best = top_p(weights, mass).any(1)
    prices = torch.ones_like(goal)
    for _ in range(ROUNDS):
        chosen = _reach(weights, (weights * prices[..., None]).sum(1), goal)
        best = torch.where((chosen.sum(-1) < best.sum(-1))[:, None], chosen, best)
        # What is missed says more than what is had: 0.99 instead of 0.9 is ten times too strict.
        missed = (1 - (weights * chosen[:, None]).sum(-1)).clamp(min=1e-4)
        prices = prices * (missed / (1 - goal).clamp(min=1e-4)).clamp(1e-2, 1.0) ** SPEED
        prices = prices / prices.amax(-1, keepdim=True)
    return best


def _reach(weights: torch.Tensor, sums: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The fewest tokens of the largest ``sums`` [H, n] at which all heads have their ``goal``: bool [H,
    n]."""
    order = sums.argsort(dim=-1, descending=True, stable=True)
    had = weights.gather(2, order[:, None].expand_as(weights)).cumsum(-1)
    # The rounding of a running sum must not ask for one token more than there are.
    needed = (had < goal[..., None] * (1 - 1e-6)).sum(-1).amax(-1) + 1
    ranks = torch.arange(sums.shape[-1], device=sums.device).expand_as(order)
    return torch.zeros_like(ranks).scatter_(1, order, ranks) < needed[:, None]
