"""Keys in 2, 4 or 8 bits a channel, from which scores are estimated without bias.

A key's difference from its centroid, in a randomly rotated space, is close to normal in every channel. It is
rounded to a uniform grid whose step is best for a normal distribution, and scaled so that its product with
itself is right; then, over rotations, so is its product with any query (RaBitQ has this for one
bit).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

STEPS = {2: 0.996, 4: 0.335, 8: 0.0308}
"""The step of least squared error for a standard normal variable, by bits (Max 1960)."""


@lru_cache(maxsize=16)
def rotation(size: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix [D, D]."""
    generator = torch.Generator().manual_seed(seed)
    basis, upper = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return basis * upper.diagonal().sign()


@dataclass(frozen=True, slots=True)
class QuantisedKeys:
    """Codes of differences from centroids, uint8 [H, m, ceil(D * bits / 8)], and factors, float16 [H, m]."""

    codes: torch.Tensor
    factors: torch.Tensor
    bits: int
    size: int

    @classmethod
    def of(cls, differences: torch.Tensor, bits: int) -> QuantisedKeys:
        """Round ``differences`` [H, m, D], finite, in the rotated space."""
        middle = 2 ** (bits - 1)
        spread = differences.square().mean(-1, keepdim=True).sqrt()
        steps = differences / (spread * STEPS[bits]).clamp(min=1e-30)
        codes = (steps.floor() + middle).clamp(0, 2 * middle - 1)
        grid = codes - (middle - 0.5)
        factors = differences.square().sum(-1) / (differences * grid).sum(-1).clamp(min=1e-30)
        return cls(_pack(codes.to(torch.uint8), bits), factors.half(), bits, differences.shape[-1])

    def restored(self) -> torch.Tensor:
        """The differences that the codes stand for, float32 [H, m, D]."""
        grid = _unpack(self.codes, self.bits)[..., : self.size].float() - (2 ** (self.bits - 1) - 0.5)
        return grid * self.factors.float()[..., None]

    def at(self, positions: torch.Tensor) -> QuantisedKeys:
        """Those at ``positions`` (int64 [H, k])."""
        codes = self.codes.gather(1, positions[..., None].expand(-1, -1, self.codes.shape[-1]))
        return QuantisedKeys(codes, self.factors.gather(1, positions), self.bits, self.size)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.codes.nbytes + self.factors.nbytes


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Neighbouring channels share a byte, the first in its lowest bits."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each))
    lanes = padded.unflatten(-1, (-1, each))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (lanes << shifts).sum(-1, dtype=torch.uint8)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
