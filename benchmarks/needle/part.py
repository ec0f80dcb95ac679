"""What every part of the needle's bench is asked, and what is promised of sparse attention."""

from __future__ import annotations

from pathlib import Path

from penstock.benchmarks.flowkv_part import Options
from penstock.kernels.sparse.serving import ServingConfig

LENGTHS = (4096, 8192, 16384)
PROMPTS = 16
MASS = 0.9
MOST_LOST = 0.01
"""Share of the answers that sparse attention may lose to dense."""
SERVING = ServingConfig(mass=MASS, least_tokens=2048, dense_layers=0, most_share=0.95, calibration_share=0.1)
"""Every layer is sparse at every length and reads what it must: with three layers and mass in most pages of
the last, the defaults would leave next to nothing sparse to be wrong."""


class NeedleOptions(Options, frozen=True, kw_only=True):
    """Choices of the person who runs the bench."""

    prompts: int = PROMPTS
    """Of each task and length."""
    folder: Path | None = None
    """A checkpoint; the shipped one if None."""
    lengths: tuple[int, ...] = LENGTHS
    """Tokens of the prompts."""
