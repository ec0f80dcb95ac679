"""Small matrix products for kernels that Numba compiles: query rows times a tile of keys or values.

A loop over tokens for one row reads a tile as often as there are rows. Here a block of rows and columns of
the result stays in registers while the common dimension passes by, as in any matrix library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import ask_for
from penstock.kernels.sparse.lanes import BYTE, FLOAT, Lanes


def _has_avx512() -> bool:
    features = config.CPU_FEATURES
    if features is None:
        features = binding.get_host_cpu_features().flatten()
    return "+avx512f" in features.split(",")


LANES = 16 if _has_avx512() else 8
"""Of a vector register, in float32."""
COLUMNS = 2 * LANES
"""Of a block; what is left of them is one vector wide."""
ROWS = 8 if LANES == 16 else 4
"""Of a block: with two vectors each, as many sums as there are registers for."""
LEAST_ROWS = 4
"""Numbers of rows are multiples of it."""


def _block(rows: int, vectors: int, ahead: bool = False) -> Any:
    """Adds to ``rows`` times ``vectors`` of the result, ``LANES`` wide; ``ahead`` asks for the lines that
    stand in the same places of what comes next."""

    @intrinsic  # type: ignore[untyped-decorator]
    def function(_typing: Any, result: Any, left: Any, right: Any, depth: Any, places: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            data = [
                context.make_array(kind)(context, builder, value).data
                for kind, value in zip(signature.args[:3], values[:3], strict=True)
            ]
            inner = cgutils.unpack_tuple(builder, values[4], 7 if ahead else 6)
            _build(builder, Lanes(builder, LANES), (rows, vectors), data, values[3], inner)
            return context.get_dummy_value()

        return types.void(result, left, right, depth, places), generate

    return function


def _build(
    builder: Any, lanes: Lanes, shape: tuple[int, int], data: list[Any], depth: Any, places: Any
) -> None:
    """The body of a block: sums wait in registers, which is what becomes of stack slots that no address is
    taken of."""
    rows, vectors = shape
    index = ir.IntType(64)
    (result, left, right), (result_at, result_step, left_at, left_step, right_at, right_step) = (
        data,
        places[:6],
    )
    following = [builder.gep(right, [at]) for at in places[6:]]

    def place(base: Any, row: int, step: Any, column: int) -> Any:
        offset = builder.add(builder.mul(index(row), step), index(column))
        return builder.gep(base, [offset])

    result, left, right = (
        builder.gep(array, [at])
        for array, at in zip((result, left, right), (result_at, left_at, right_at), strict=True)
    )
    sums = [[cgutils.alloca_once(builder, lanes.floats) for _ in range(vectors)] for _ in range(rows)]
    for row in range(rows):
        for vector in range(vectors):
            start = lanes.load(place(result, row, result_step, LANES * vector), lanes.floats)
            builder.store(start, sums[row][vector])
    with cgutils.for_range(builder, depth) as loop:
        offset = builder.mul(loop.index, right_step)
        line = builder.gep(right, [offset])
        for other in following:
            ask_for(builder, builder.gep(other, [offset]))
        wide = [_widened(builder, lanes, builder.gep(line, [index(LANES * each)])) for each in range(vectors)]
        for row in range(rows):
            factor = lanes.spread(builder.load(builder.gep(place(left, row, left_step, 0), [loop.index])))
            for vector in range(vectors):
                name = f"llvm.fmuladd.v{LANES}f32"
                slot = sums[row][vector]
                added = lanes.call(name, lanes.floats, factor, wide[vector], builder.load(slot))
                builder.store(added, slot)
    for row in range(rows):
        for vector in range(vectors):
            lanes.store(builder.load(sums[row][vector]), place(result, row, result_step, LANES * vector))


def _widened(builder: Any, lanes: Lanes, source: Any) -> Any:
    """A vector of float32 from ``source``, a pointer to them, to the 16 bits of bfloat16, or to bytes."""
    if source.type.pointee == FLOAT:
        return lanes.load(source, lanes.floats)
    if source.type.pointee == BYTE:
        some = builder.load(builder.bitcast(source, ir.VectorType(BYTE, LANES).as_pointer()), align=1)
        return builder.sitofp(builder.sext(some, lanes.words), lanes.floats)
    halves = builder.load(builder.bitcast(source, ir.VectorType(ir.IntType(16), LANES).as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(halves, lanes.words), lanes.constant(16)), lanes.floats)


@intrinsic  # type: ignore[untyped-decorator]
def bring(_typing: Any, result: Any, result_at: Any, source: Any, source_at: Any) -> Any:  # noqa: ARG001
    """``bring(result, result_at, source, source_at)``: ``LANES`` elements, from element ``source_at`` of the
    contiguous ``source``, float32, int16 with the bits of bfloat16, or int8, to a float32 ``result``.

    A loop says the same, but the vectors that become of it first find out whether its arrays overlap.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        lanes = Lanes(builder, LANES)
        target, origin = (
            builder.gep(
                context.make_array(signature.args[k])(context, builder, values[k]).data, [values[k + 1]]
            )
            for k in (0, 2)
        )
        lanes.store(_widened(builder, lanes, origin), target)
        return context.get_dummy_value()

    return types.void(result, types.intp, source, types.intp), generate


def _reduction(join: str, reduce: str, start: Sequence[Any] = ()) -> Any:
    """An intrinsic that makes one number of ``COLUMNS`` elements of a contiguous float32 array, from the one
    that is named on. A loop does so one element at a time, or with a vector's instructions for a few."""

    @intrinsic  # type: ignore[untyped-decorator]
    def function(_typing: Any, array: Any, first: Any) -> Any:  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            lanes = Lanes(builder, LANES)
            data = context.make_array(signature.args[0])(context, builder, values[0]).data
            low, high = (
                lanes.load(builder.gep(data, [builder.add(values[1], ir.IntType(64)(at))]), lanes.floats)
                for at in (0, LANES)
            )
            if join == "add":
                both = builder.fadd(low, high)
            else:
                both = lanes.call(f"llvm.{join}.v{LANES}f32", lanes.floats, low, high)
            name = f"llvm.vector.reduce.{reduce}.v{LANES}f32"
            return lanes.call(name, FLOAT, *start, both, fast=("reassoc",))

        return types.float32(array, types.intp), generate

    return function


peak_of = _reduction("maxnum", "fmax")
"""The largest element, NaN left out unless there is nothing else."""
sum_of = _reduction("add", "fadd", (FLOAT(-0.0),))


_tall_wide, _tall_narrow = _block(ROWS, 2), _block(ROWS, 1)
_low_wide, _low_narrow = _block(LEAST_ROWS, 2), _block(LEAST_ROWS, 1)


@compiled
def add_product(result: Any, left: Any, right: Any, rows: Any) -> None:
    """Add to the first ``rows`` rows of ``result`` [R, C] those of ``left`` [R, K] times ``right`` [K, C].

    All are contiguous float32; ``rows`` is a multiple of ``LEAST_ROWS`` and C of ``LANES``.
    """
    columns, depth = result.shape[1], left.shape[1]
    column = 0
    while column < columns:
        wide = column + COLUMNS <= columns
        row = 0
        while row < rows:
            places = (row * columns + column, columns, row * depth, depth, column, columns)
            if row + ROWS <= rows:
                if wide:
                    _tall_wide(result, left, right, depth, places)
                else:
                    _tall_narrow(result, left, right, depth, places)
                row += ROWS
            else:
                if wide:
                    _low_wide(result, left, right, depth, places)
                else:
                    _low_narrow(result, left, right, depth, places)
                row += LEAST_ROWS
        column += COLUMNS


_tall_paged, _tall_paged_narrow = _block(ROWS, 2, ahead=True), _block(ROWS, 1, ahead=True)
_low_paged, _low_paged_narrow = _block(LEAST_ROWS, 2, ahead=True), _block(LEAST_ROWS, 1, ahead=True)


@compiled
def add_paged_product(
    result: Any, left: Any, right: Any, rows: Any, depth: Any, at: Any, step: Any, ahead: Any
) -> None:
    """As ``add_product``, with the matrix on the right where a cache holds it: its row ``k``, of the first
    ``depth``, begins at element ``at + k * step`` of ``right``, float32 or int16 with the bits of bfloat16.

    What lies in the same places from element ``ahead`` on is asked for meanwhile: the matrix of the product
    that comes next.
    """
    columns, width = result.shape[1], left.shape[1]
    for column in range(0, columns, COLUMNS):
        wide = column + COLUMNS <= columns
        row = 0
        while row < rows:
            result_at, left_at = row * columns + column, row * width
            places = (result_at, columns, left_at, width, at + column, step, ahead + column)
            if row + ROWS <= rows:
                if wide:
                    _tall_paged(result, left, right, depth, places)
                else:
                    _tall_paged_narrow(result, left, right, depth, places)
                row += ROWS
            else:
                if wide:
                    _low_paged(result, left, right, depth, places)
                else:
                    _low_paged_narrow(result, left, right, depth, places)
                row += LEAST_ROWS
