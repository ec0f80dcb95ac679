"""The digester that fits where a KV cache lies; both engines' adapters hash through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.connectors.digest import Digester, DramDigester

if TYPE_CHECKING:
    import torch

    from penstock.connectors.geometry import CacheGeometry


def digester_of(geometry: CacheGeometry, some_of_it: torch.Tensor) -> Digester:
    """Hashes blocks of the allocation that ``some_of_it`` is a view of."""
    if geometry.memory == "DRAM":
        return DramDigester(geometry)
    import torch

    from penstock.kernels.block_digest import WORD_BYTES, DeviceDigester

    words = torch.empty(0, dtype=torch.int64, device=some_of_it.device)
    words.set_(some_of_it.untyped_storage(), 0, (geometry.size // WORD_BYTES,), (1,))
    return DeviceDigester(words, [(s.offset, s.width, s.stride) for s in geometry.strips])
