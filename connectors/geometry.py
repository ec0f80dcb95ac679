"""Where the bytes of a KV block lie, whatever the layout.

A KV cache is one allocation. A *strip* is a set of equal-sized pieces, one a block, at a constant stride:
block ``b``'s piece starts ``offset + b * stride`` bytes into the allocation and is ``width`` bytes long.
A block-outermost layout (``BLHNC``) gives one dense strip for all layers, so a run of blocks is one extent;
a layer-outermost layout (``LBHNC``) gives one dense strip a layer. Contents are opaque bytes: the CPU
kernels of vLLM store K transposed, and nothing here needs to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.connectors.runs import JointRun

MemoryKind = Literal["DRAM", "VRAM"]
Int64Array = npt.NDArray[np.int64]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 61)]
"""An address or a size: sums of a few stay within int64. Checked where a geometry comes off the wire."""
MAX_STRIPS = 4096


class LayerPages(msgspec.Struct, frozen=True):
    """Placement of ``num_layers`` equal-shaped layers, in bytes (vLLM's ``KVCacheTensor`` and page size).

    Layer ``l``'s page of block ``b`` starts at ``offset + l * layer_stride + b * block_stride``.
    """

    num_layers: int
    layer_stride: int
    block_stride: int
    page_bytes: int
    offset: int = 0


class Strip(msgspec.Struct, frozen=True, order=True):
    """One piece of ``width`` bytes a block, ``stride`` bytes apart, the first at ``offset``."""

    offset: Bytes
    width: Bytes
    stride: Bytes

    @property
    def is_dense(self) -> bool:
        """True where the pieces of consecutive blocks touch, so that a run of blocks is one extent."""
        return self.width == self.stride


def strips_of(pages: Iterable[LayerPages]) -> tuple[Strip, ...]:
    """Merge the pages of all layers into the fewest strips, in address order.

    Raises:
        ValueError: two pages overlap, or a page is larger than its stride.
    """
    pieces = sorted(
        Strip(p.offset + layer * p.layer_stride, p.page_bytes, p.block_stride)
        for p in pages
        for layer in range(p.num_layers)
    )
    merged: list[Strip] = []
    for piece in pieces:
        if piece.width > piece.stride:
            raise ValueError(f"a page of {piece.width} bytes does not fit a block stride of {piece.stride}")
        last = merged[-1] if merged else None
        if last and last.stride == piece.stride and piece.offset < last.offset + last.width:
            raise ValueError(f"pages overlap at byte {piece.offset}")
        if (
            last
            and last.stride == piece.stride
            and piece.offset == last.offset + last.width <= last.offset + last.stride - piece.width
        ):
            merged[-1] = Strip(last.offset, last.width + piece.width, last.stride)
        else:
            merged.append(piece)
    return tuple(merged)


class CacheGeometry(msgspec.Struct, frozen=True):
    """One rank's KV cache in its own address space."""

    base_address: Bytes
    size: Bytes
    """Bytes in the allocation."""
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    strips: Annotated[tuple[Strip, ...], msgspec.Meta(min_length=1, max_length=MAX_STRIPS)]
    memory: MemoryKind = "DRAM"
    device: int = 0

    def __post_init__(self) -> None:
        for strip in self.strips:
            end = strip.offset + (self.num_blocks - 1) * strip.stride + strip.width
            if strip.offset < 0 or end > self.size:
                raise ValueError(f"{strip} ends at byte {end} of an allocation of {self.size} bytes")

    @property
    def block_bytes(self) -> int:
        """Bytes of KV cache that one block holds over all layers."""
        return sum(strip.width for strip in self.strips)

    @property
    def extents_per_run(self) -> int | None:
        """Extents that a run of blocks takes, or None where that depends on the run's length."""
        return len(self.strips) if all(strip.is_dense for strip in self.strips) else None


class Moves(msgspec.Struct, frozen=True):
    """Byte ranges to copy: three int64 arrays of shape (descriptors,), in bytes and absolute addresses."""

    source: Int64Array
    target: Int64Array
    length: Int64Array

    def __len__(self) -> int:
        return len(self.length)

    @property
    def num_bytes(self) -> int:
        """Bytes that all moves copy."""
        return int(self.length.sum())

    def part(self, start: int, stop: int) -> Moves:
        """The moves of bytes ``start`` to ``stop``, counted over all moves in order."""
        before = np.cumsum(self.length) - self.length
        first = np.clip(start - before, 0, self.length)
        last = np.clip(stop - before, 0, self.length)
        some = last > first
        return Moves((self.source + first)[some], (self.target + first)[some], (last - first)[some])


def plan_moves(source: CacheGeometry, target: CacheGeometry, joint: Sequence[JointRun]) -> Moves:
    """The fewest byte moves that bring ``joint`` from ``source`` to ``target``. O(runs x strips).

    A joint run is one move a dense strip; a strip with gaps takes one move a block.

    Raises:
        ValueError: the two geometries do not hold the same pieces, or a run leaves either pool.
    """
    widths = [strip.width for strip in source.strips]
    if widths != [strip.width for strip in target.strips]:
        raise ValueError("source and target hold different pieces a block")
    runs = np.array(joint, dtype=np.int64).reshape(-1, 3)
    starts, lengths = runs[:, :2], runs[:, 2]
    pools = np.array([source.num_blocks, target.num_blocks])
    if (starts < 0).any() or (lengths <= 0).any() or (starts + lengths[:, None] > pools).any():
        raise ValueError(f"a run leaves the pools of {source.num_blocks} and {target.num_blocks} blocks")
    parts = [
        _strip_moves(source, target, s, t, runs) for s, t in zip(source.strips, target.strips, strict=True)
    ]
    return Moves(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _strip_moves(
    source: CacheGeometry, target: CacheGeometry, s: Strip, t: Strip, runs: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    if not (s.is_dense and t.is_dense):
        runs = _unit_runs(runs)
    return (
        source.base_address + s.offset + runs[:, 0] * s.stride,
        target.base_address + t.offset + runs[:, 1] * t.stride,
        runs[:, 2] * s.width,
    )


def _unit_runs(runs: Int64Array) -> Int64Array:
    lengths = runs[:, 2]
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    step = np.arange(int(lengths.sum())) - first
    starts = np.repeat(runs[:, :2], lengths, axis=0) + step[:, None]
    return np.column_stack([starts, np.ones(len(step), dtype=np.int64)])
