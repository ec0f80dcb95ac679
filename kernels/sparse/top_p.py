"""The fewest tokens that have a share of the mass, without sorting."""

from __future__ import annotations

import torch

STEPS = 24
"""Halvings of the threshold's logarithm: 60 / 2**24 is below what float32 weights tell apart."""
LOG_RANGE = 60.0


def top_p(weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Tokens of the largest ``weights`` (>= 0, [..., n]) whose sum reaches ``mass`` [...]; bool [..., n].

    The threshold is searched by bisection of its logarithm (Twilight has it of the weight
    itself). Where many are equal, as many as are needed are taken from the front. All of them if the sum of
    all is less.
    """
    if weights.shape[-1] == 0:
        return torch.zeros(weights.shape, dtype=torch.bool)
    low, high = _bracket(weights, mass)
    surely = weights >= high
    between = (weights >= low) & ~surely
    short = mass[..., None] - (weights * surely).sum(-1, keepdim=True)
    rest = weights * between
    return surely | (between & (rest.cumsum(-1) - rest < short))


def _bracket(weights: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds [..., 1]: at ``low`` the mass is reached (or everything is taken), at ``high`` it is not."""
    peak = weights.amax(-1, keepdim=True)
    low = torch.full_like(peak, -LOG_RANGE)
    high = torch.full_like(peak, 1e-3)
    for _ in range(STEPS):
        middle = (low + high) / 2
        reached = (weights * (weights >= peak * middle.exp())).sum(-1, keepdim=True) >= mass[..., None]
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    # What is too small for the range is taken together, and only where the rest does not suffice.
    return torch.where(low == -LOG_RANGE, torch.zeros_like(low), peak * low.exp()), peak * high.exp()
