"""Products of quantised clusters with query heads, many clusters to a vector, for compiled kernels.

A loop over the channels of one cluster ends with a sum across a vector, which costs as much as the products
before it. Here clusters lie side by side: eight channels of each make two 32-bit lanes, and the instruction
of VNNI adds the four products of every lane to it. Where a processor has none, multiplications of 16 bits
give the same numbers, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.block_index import CHANNELS, SHIFT
from penstock.kernels.sparse.compiled_math import F32, NOTHING

FOUR = 4
"""Query heads that share a read of a cluster."""
BYTES = 4
"""Channels of one lane."""
HALVES = CHANNELS // BYTES
"""Lanes of a cluster."""
HIGH = 254
"""What the higher of a query's two 8-bit digits counts; the lower one is between -127 and 127."""
MOST_DIGITS = 127 * HIGH
WORD, FLOAT, BYTE = ir.IntType(32), ir.FloatType(), ir.IntType(8)


def has_vnni() -> bool:
    """Whether the processor that Numba compiles for multiplies and adds bytes in vectors of any length."""
    features = config.CPU_FEATURES
    if features is None:
        features = binding.get_host_cpu_features().flatten()
    return {"+avx512vnni", "+avx512vl"} <= set(features.split(","))


VNNI = has_vnni()
PLACES = 2 * FOUR if VNNI else FOUR * BYTES
"""32-bit words of a query that go with one lane: two digits of each head, or one word a channel."""
WORDS = PLACES * HALVES
"""Of all lanes of a cluster; those of one place lie together."""


@compiled
def pack(query: Any, words: Any, offsets: Any, units: Any, lengths: Any) -> None:
    """Round ``query`` float32 [H, G, D] to 16 bits a channel, as ``lane_scores`` reads it.

    Written are ``words`` int32 [H, F, D / CHANNELS, WORDS], for ``F`` times four heads, ``offsets`` int32
    [H, F, 4], what ``SHIFT`` adds to a product, ``units`` float32 [H, F, 4], and ``lengths`` float32 [H], the
    mean square of a KV head's rows. Heads beyond ``G`` are zeros. A row that is not finite has a unit that is
    not, and so no finite product.
    """
    heads, group, size = query.shape
    digits = np.zeros((words.shape[1] * FOUR, words.shape[2] * CHANNELS), np.int32)
    for head in range(heads):
        squares = F32(0)
        for g in range(len(digits)):
            unit, total = F32(0), np.int32(0)
            if g < group:
                unit, square = _measure(query[head, g])
                squares += square
                for d in range(size):
                    digits[g, d] = np.int32(np.rint(query[head, g, d] / unit)) if np.isfinite(unit) else 0
                    total += digits[g, d]
            units[head, g // FOUR, g % FOUR] = unit
            offsets[head, g // FOUR, g % FOUR] = np.int32(SHIFT) * total
        lengths[head] = squares / F32(group)
        for four in range(words.shape[1]):
            _pack_four(digits[FOUR * four : FOUR * four + FOUR], words[head, four])


@compiled
def _measure(row: Any) -> Any:
    """What one digit of ``row`` counts, and the square of its length; neither is finite where it is not."""
    peak, square = F32(1e-30), F32(0)
    for d in range(len(row)):
        peak = max(peak, abs(row[d]))
        square += row[d] * row[d]
    return (peak if np.isfinite(square) else square) / F32(MOST_DIGITS), square


@compiled
def _pack_four(digits: Any, words: Any) -> None:
    for step in range(words.shape[0]):
        for g in range(FOUR):
            for half in range(HALVES):
                first = CHANNELS * step + BYTES * half
                if VNNI:
                    high, low = np.int32(0), np.int32(0)
                    for j in range(BYTES):
                        digit = digits[g, first + j]
                        upper = np.int32(np.rint(digit / HIGH))
                        high |= np.int32((upper & 255) << (8 * j))
                        low |= np.int32(((digit - HIGH * upper) & 255) << (8 * j))
                    words[step, HALVES * 2 * g + half] = high
                    words[step, HALVES * (2 * g + 1) + half] = low
                else:
                    for j in range(BYTES):
                        words[step, HALVES * (BYTES * g + j) + half] = digits[g, first + j]


class Lanes:
    """Builds instructions on vectors of ``lanes`` 32-bit numbers."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self._builder, self.count = builder, lanes
        self.words, self.floats = ir.VectorType(WORD, lanes), ir.VectorType(FLOAT, lanes)

    def constant(self, value: float) -> Any:
        kind = self.words if isinstance(value, int) else self.floats
        return ir.Constant(kind, [value] * self.count)

    def spread(self, scalar: Any) -> Any:
        """A vector of ``scalar`` in every lane; of one of 64 bits, half as many."""
        count = self.count * WORD.width // (WORD.width if scalar.type == FLOAT else scalar.type.width)
        nothing = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
        first = self._builder.insert_element(nothing, scalar, WORD(0))
        where = ir.Constant(ir.VectorType(WORD, count), [0] * count)
        return self._builder.shuffle_vector(first, nothing, where)

    def load(self, pointer: Any, kind: Any) -> Any:
        found = self._builder.load(self._builder.bitcast(pointer, kind.as_pointer()))
        found.align = 4
        return found

    def store(self, value: Any, pointer: Any) -> None:
        self._builder.store(value, self._builder.bitcast(pointer, value.type.as_pointer())).align = 4

    def call(self, name: str, result: Any, *arguments: Any, fast: Sequence[str] = ()) -> Any:
        """Call LLVM's function ``name``."""
        kind = ir.FunctionType(result, [each.type for each in arguments])
        module = self._builder.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return self._builder.call(function, arguments, fastmath=fast)

    def add_products(self, sums: list[Any], codes: Any, words: Any) -> None:
        """Add to ``sums`` the products of ``codes``, four bytes a lane, and the ``words`` of a query."""
        b = self._builder
        for place in range(PLACES):
            pair = self.load(b.gep(words, [WORD(HALVES * place)]), ir.IntType(HALVES * WORD.width))
            word = b.bitcast(self.spread(pair), self.words)
            if VNNI:
                name = f"llvm.x86.avx512.vpdpbusd.{32 * self.count}"
                b.store(self.call(name, self.words, b.load(sums[place]), codes, word), sums[place])
                continue
            channel = b.lshr(codes, self.constant(8 * (place % BYTES)))
            product = b.mul(b.and_(channel, self.constant(255)), word)
            b.store(b.add(b.load(sums[place // BYTES]), product), sums[place // BYTES])

    def whole(self, sums: list[Any], g: int) -> Any:
        """The products of head ``g``, of both digits and of all lanes of a cluster, one for each cluster."""
        b = self._builder
        if VNNI:
            both = b.add(b.mul(b.load(sums[2 * g]), self.constant(HIGH)), b.load(sums[2 * g + 1]))
        else:
            both = b.load(sums[g])
        nothing = ir.Constant(self.words, ir.Undefined)
        even, odd = (
            b.shuffle_vector(
                both,
                nothing,
                ir.Constant(ir.VectorType(WORD, self.count // HALVES), [*range(half, self.count, HALVES)]),
            )
            for half in range(HALVES)
        )
        return b.add(even, odd)

    def beside(self, spreads: Any, rooms: Any, length: Any) -> Any:
        """What clusters have beside the products of their means (``clusters.log_masses``)."""
        b = self._builder
        variance = b.fmul(self.spread(length), spreads)
        full = b.select(b.fcmp_ordered(">", rooms, self.constant(0.0)), rooms, self.constant(0.0))
        wide = b.fmul(full, self.constant(2.0))
        free = b.fadd(rooms, b.fmul(variance, self.constant(0.5)))
        root = self.call(f"llvm.sqrt.v{self.count}f32", self.floats, b.fmul(variance, wide))
        above = b.select(b.fcmp_ordered("<", variance, wide), free, root)
        return b.select(b.fcmp_ordered("<", rooms, self.constant(0.0)), self.constant(float(NOTHING)), above)


def _build_scores(builder: Any, lanes: Lanes, views: list[Any], places: Sequence[Any]) -> None:
    """The body of ``lane_scores``."""
    b, index = builder, ir.IntType(64)
    codes, facts, words, offsets, units, lengths, scores, peaks = views
    block, head, four, lane, row = places

    def at(view: Any, *places: Any) -> Any:
        data = b.bitcast(view.data, BYTE.as_pointer())
        for axis, place in enumerate(places):
            number = index(place) if isinstance(place, int) else place
            data = b.gep(data, [b.mul(number, b.extract_value(view.strides, axis))])
        return b.bitcast(data, view.data.type)

    wide = Lanes(b, HALVES * lanes.count)
    sums = [cgutils.alloca_once(b, wide.words) for _ in range(2 * FOUR if VNNI else FOUR)]
    for each in sums:
        b.store(wide.constant(0), each)
    with cgutils.for_range(b, b.extract_value(words.shape, 2)) as loop:
        some = wide.load(at(codes, block, head, loop.index, lane), wide.words)
        wide.add_products(sums, some, at(words, head, four, loop.index))
    scale, spread, room = (lanes.load(at(facts, block, head, term, lane), lanes.floats) for term in range(3))
    beside = lanes.beside(spread, room, lanes.load(at(lengths, head), FLOAT))
    for g in range(FOUR):
        product = b.sub(wide.whole(sums, g), lanes.spread(lanes.load(at(offsets, head, four, g), WORD)))
        unit = lanes.spread(lanes.load(at(units, head, four, g), FLOAT))
        score = b.fadd(b.fmul(b.fmul(b.sitofp(product, lanes.floats), unit), scale), beside)
        lanes.store(score, at(scores, head, four, g, row))
        peak = lanes.load(at(peaks, head, four, g), lanes.floats)
        above = b.and_(b.fcmp_ordered(">", score, peak), b.fcmp_ordered("<", score, lanes.constant(inf)))
        lanes.store(b.select(above, score, peak), at(peaks, head, four, g))


def _lane_scores(lanes: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def function(
        _typing: Any,
        codes: Any,
        facts: Any,
        words: Any,
        offsets: Any,
        units: Any,
        lengths: Any,
        scores: Any,
        peaks: Any,
        where: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            views = [
                context.make_array(kind)(context, builder, value)
                for kind, value in zip(signature.args[:8], values[:8], strict=True)
            ]
            inner = cgutils.unpack_tuple(builder, values[8], 5)
            _build_scores(builder, Lanes(builder, lanes), views, inner)
            return context.get_dummy_value()

        return types.void(codes, facts, words, offsets, units, lengths, scores, peaks, where), generate

    return function


def _lane_sum(lanes: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def function(_typing: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            view = context.make_array(signature.args[0])(context, builder, values[0])
            vectors = Lanes(builder, lanes)
            row = vectors.load(view.data, vectors.floats)
            name = f"llvm.vector.reduce.fadd.v{lanes}f32"
            return vectors.call(name, FLOAT, FLOAT(-0.0), row, fast=("reassoc",))

        return types.float32(row), generate

    return function


_scores4, _scores8 = (_lane_scores(lanes) for lanes in (4, 8))
_sum4, _sum8 = (_lane_sum(lanes) for lanes in (4, 8))


@compiled
def lane_scores(
    codes: Any,
    facts: Any,
    words: Any,
    offsets: Any,
    units: Any,
    lengths: Any,
    scores: Any,
    peaks: Any,
    where: Any,
) -> None:
    """Scores of ``L`` clusters that lie side by side, for four query heads.

    ``codes`` uint8 [B, H, D / CHANNELS, S, CHANNELS] and ``facts`` float32 [B, H, 3, S] are the tables of a
    ``BlockIndex``; ``words``, ``offsets``, ``units`` and ``lengths`` those of ``pack``. Written are
    ``scores`` float32 [H, F, 4, R, L], and ``peaks`` [H, F, 4, L] keep the largest finite one of each lane.
    ``where`` says which: a block, a KV head, four of its query heads, the first lane, and the row of scores.
    """
    if scores.shape[4] == 4:
        _scores4(codes, facts, words, offsets, units, lengths, scores, peaks, where)
    else:
        _scores8(codes, facts, words, offsets, units, lengths, scores, peaks, where)


@compiled
def lane_sum(row: Any) -> Any:
    """The sum of ``row``, float32, 4 or 8 of them."""
    return _sum4(row) if len(row) == 4 else _sum8(row)
