"""Which kernel reads shared prefixes once on a device, and why: asked at start-up and by the doctor.

What FlashInfer can do is as of 0.7: ``MultiLevelCascadeAttentionWrapper`` is planned by the host, for a fixed
number of levels in each of which every request has a part (``flashinfer.cascade``).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.kernels.decode_paths import Device

Path = Literal["compiled"]


class Choice(msgspec.Struct, frozen=True):
    """The path to take, None for the engine's own attention; why; and why each other one is not taken."""

    path: Path | None
    reason: str
    refused: dict[str, str] = {}


def choose_prefix_path(device: Device | None, *, numba: bool) -> Choice:
    """For ``device``, or for the CPU where there is none, with or without Numba."""
    if device is not None:
        wrapper = "no backend plans it" if device.flashinfer else "FlashInfer is not installed"
        return Choice(
            None,
            "no backend for CUDA: --shared-prefix-attention is refused",
            {
                "compiled": "it is for CPUs",
                "flashinfer-cascade": wrapper,
                "triton": "there is no such kernel",
            },
        )
    if not numba:
        return Choice(None, "it is compiled by Numba, which is missing", {"compiled": "Numba is missing"})
    return Choice("compiled", "pages of a prefix are multiplied with the rows of all its requests at once")
