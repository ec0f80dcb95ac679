"""The block digest of :mod:`penstock.kernels.block_digest` as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 4096
"""64-bit words that one program sums."""


@triton.jit  # type: ignore[untyped-decorator]
def _digest(memory, ids, out, offset, width, stride, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    row = tl.program_id(0)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = column < width
    block = tl.load(ids + row)
    word = tl.load(memory + offset + block * stride + column, mask=inside, other=0).to(tl.uint64)
    x = word + (column + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    total = tl.sum(tl.where(inside, x, 0).to(tl.int64), axis=0)
    tl.atomic_add(out + row, total)


def digest_blocks(
    memory: torch.Tensor, ids: torch.Tensor, offset: int, width: int, stride: int
) -> torch.Tensor:
    """Digests of one strip of each block in ``ids``; all sizes in 64-bit words. Returns int64 (len(ids),)."""
    out = torch.zeros(len(ids), dtype=torch.int64, device=memory.device)
    if len(ids):
        _digest[(len(ids), triton.cdiv(width, CHUNK))](memory, ids, out, offset, width, stride, CHUNK=CHUNK)
    return out
