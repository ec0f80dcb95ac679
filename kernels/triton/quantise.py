# ruff: noqa: ANN001, ANN202
"""Keys into few bits, and scores from them: the kernels of :mod:`penstock.kernels.sparse.quantised`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from penstock.kernels.sparse.quantised import STEPS, QuantisedKeys
from penstock.kernels.triton.launch import tile

ROWS = 32
TOKENS = 64


@triton.jit
def _quantise(
    differences, codes, factors, tokens, size, width, row_head, row_token, step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = 8 // BITS
    middle: tl.constexpr = 2 ** (BITS - 1)
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.arange(0, WIDTH)
    rows = differences + head * row_head + token.to(tl.int64)[:, None] * row_token
    square = tl.zeros([ROWS], tl.float32)
    for lane in tl.static_range(EACH):
        channel = (byte * EACH + lane)[None, :]
        part = tl.load(rows + channel, mask=(token < tokens)[:, None] & (channel < size), other=0.0)
        square += tl.sum(part.to(tl.float32) * part.to(tl.float32), 1)
    unit = tl.maximum(tl.sqrt(square / size) * step, 1e-30)
    packed = tl.zeros([ROWS, WIDTH], tl.int32)
    along = tl.zeros([ROWS], tl.float32)
    for lane in tl.static_range(EACH):
        channel = (byte * EACH + lane)[None, :]
        inside = (token < tokens)[:, None] & (channel < size)
        part = tl.load(rows + channel, mask=inside, other=0.0).to(tl.float32)
        code = tl.minimum(tl.maximum(tl.floor(part / unit[:, None]) + middle, 0.0), 2.0 * middle - 1)
        along += tl.sum(part * (code - (middle - 0.5)), 1)
        packed = packed | (tl.where(inside, code, 0.0).to(tl.int32) << (lane * BITS))
    place = codes + (head * tokens + token)[:, None] * width + byte[None, :]
    tl.store(place, packed.to(tl.uint8), mask=(token < tokens)[:, None] & (byte < width)[None, :])
    factor = square / tl.maximum(along, 1e-30)
    tl.store(factors + head * tokens + token, factor.to(tl.float16), mask=token < tokens)


@triton.jit
def _scores(
    query, codes, factors, owner, order, near, products, lengths, out,
    heads, group, size, width, capacity, clusters, positions,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = 8 // BITS
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    member = tl.arange(0, GROUP)
    byte = tl.arange(0, WIDTH)
    present = at < tl.load(lengths + row // heads)
    cluster = tl.load(owner + row * capacity + at, mask=present, other=0)
    wanted = present & (tl.load(near + row * clusters + cluster, mask=present, other=0) > 0)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        place = codes + (row * capacity + at)[:, None] * width + byte[None, :]
        packed = tl.load(place, mask=wanted[:, None] & (byte < width)[None, :], other=0).to(tl.int32)
        score = tl.zeros([GROUP, TOKENS], tl.float32)
        for lane in tl.static_range(EACH):
            channel = byte * EACH + lane
            part = tl.load(
                query + (row * group + member)[:, None] * size + channel[None, :],
                mask=(member < group)[:, None] & (channel < size)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            code = ((packed >> (lane * BITS)) & (2**BITS - 1)).to(tl.float32) - (2 ** (BITS - 1) - 0.5)
            score = tl.dot(part, tl.trans(code), score, input_precision=PRECISION)
        factor = tl.load(factors + row * capacity + at, mask=wanted, other=0.0).to(tl.float32)
        asked = (member < group)[:, None] & wanted[None, :]
        place = products + (row * group + member)[:, None] * clusters + cluster[None, :]
        score = score * factor[None, :] + tl.load(place, mask=asked, other=0.0)
        token = tl.load(order + row * capacity + at, mask=wanted, other=0)
        tl.store(out + (row * group + member)[:, None] * positions + token[None, :], score, mask=asked)


def quantise(differences: torch.Tensor, bits: int) -> QuantisedKeys:
    """``QuantisedKeys.of``: finite ``differences`` [H, m, D] in the rotated space, in 2, 4 or 8 ``bits``."""
    heads, tokens, size = differences.shape
    width = -(-size * bits // 8)
    codes = torch.empty(heads, tokens, width, dtype=torch.uint8, device=differences.device)
    factors = torch.empty(heads, tokens, dtype=torch.float16, device=differences.device)
    if factors.numel():
        _quantise[(triton.cdiv(tokens, ROWS), heads)](
            differences, codes, factors, tokens, size, width, differences.stride(0), differences.stride(1),
            STEPS[bits], ROWS=ROWS, WIDTH=tile(width), BITS=bits,
        )  # fmt: skip
    return QuantisedKeys(codes, factors, bits, size)


def score_keys(
    query: torch.Tensor,
    keys: QuantisedKeys,
    owner: torch.Tensor,
    order: torch.Tensor,
    near: torch.Tensor,
    products: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Estimated scores of the tokens of ``near`` clusters into ``out``; nothing else of it is touched.

    Of ``R`` rows: ``query`` float32 [R, G, D], rotated; ``keys`` of [R, m, D] in the order of clusters;
    ``owner`` and ``order`` int32 [R, m], the cluster and the position of each; ``near`` uint8 [R, C];
    ``products`` float32 [R, G, C] of query and centroids; ``lengths`` int32 [B], how many of the ``m`` a
    request has; ``out`` float32 [R, G, n] by position. All are contiguous.
    """
    rows, group, size = query.shape
    capacity = owner.shape[1]
    if capacity:
        _scores[(triton.cdiv(capacity, TOKENS), rows)](
            query, keys.codes, keys.factors, owner, order, near, products, lengths, out,
            rows // len(lengths), group, size, keys.codes.shape[2], capacity, near.shape[1], out.shape[2],
            GROUP=tile(group), TOKENS=TOKENS, WIDTH=tile(keys.codes.shape[2]), BITS=keys.bits,
            PRECISION="tf32x3",
        )  # fmt: skip
