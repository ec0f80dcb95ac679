"""Exact masses of pages, and attention over chosen ones, in a cache of one row a token; compiled by Numba.

``TokenPages`` has the same in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.kernels.numba_support import compiled
from penstock.kernels.sparse.compiled_math import F32, NOTHING, exp, log, widen
from penstock.kernels.sparse.fused_exact import log_sum


@compiled
def exact_log_masses(
    keys: Any,
    stride: Any,
    first: Any,
    page_tokens: Any,
    blocks: Any,
    pages: Any,
    query: Any,
    tail: Any,
    logs: Any,
) -> None:
    """Write the logs of the masses of ``pages`` to ``logs``.

    ``keys`` [R] is contiguous, float32 or int16 with the bits of bfloat16: channel ``d`` of KV head ``first +
    h`` of the token in slot ``t`` is at ``t * stride + (first + h) * D + d``, and block ``b`` has the slots
    from ``b * page_tokens`` on. ``blocks`` int64 [P] are those of a request, ``pages`` int64 [K] numbers
    among them. ``query`` float32 [H, G, D]; ``logs`` float32 [H, G, P]. Of the last page of P, the first
    ``tail`` tokens count.
    """
    heads, group, size = query.shape
    row = np.empty(size, np.float32)
    scores = np.empty((group, page_tokens), np.float32)
    for head in range(heads):
        for k in range(len(pages)):
            page = pages[k]
            count = tail if page == len(blocks) - 1 else page_tokens
            at = blocks[page] * page_tokens * stride + (first + head) * size
            _score(keys, at, stride, count, query, head, row, scores)
            for g in range(group):
                logs[head, g, page] = log_sum(scores[g, :count])


@compiled
def attend(
    keys: Any,
    values: Any,
    strides: Any,
    heads: Any,
    page_tokens: Any,
    blocks: Any,
    chosen: Any,
    tail: Any,
    query: Any,
    output: Any,
    lse: Any,
) -> None:
    """Write the attention of ``query`` over ``chosen`` pages to ``output``, its log-sum-exp to ``lse``.

    ``keys`` and ``values`` lie as in ``exact_log_masses``, a token of theirs ``strides`` (two) apart.
    ``heads`` (two) are the first KV head and the one behind the last of those to compute, so that several
    threads share a request. ``chosen`` bool [H, P]; ``query`` float32 [H, G, D], ``output`` float32 [H, G, V]
    and ``lse`` float32 [H, G] are of all heads, contiguous. A page that is not chosen is not read; no page at
    all is 0 and -inf.
    """
    _, group, size = query.shape
    width = output.shape[2]
    row = np.empty(max(size, width), np.float32)
    scores = np.empty((group, page_tokens), np.float32)
    for head in range(heads[0], heads[1]):
        peaks = np.full(group, NOTHING, np.float32)
        sums = np.zeros(group, np.float32)
        output[head] = F32(0)
        for page in range(len(blocks)):
            if not chosen[head, page]:
                continue
            count = tail if page == len(blocks) - 1 else page_tokens
            slot = blocks[page] * page_tokens
            _score(keys, slot * strides[0] + head * size, strides[0], count, query, head, row, scores)
            _weigh(scores, count, peaks, sums, output, head)
            _add(values, slot * strides[1] + head * width, strides[1], count, scores, output, head, row)
        for g in range(group):
            lse[head, g] = peaks[g] + log(sums[g]) if sums[g] != 0 else F32(-np.inf)
            for d in range(width):
                output[head, g, d] = output[head, g, d] / sums[g] if sums[g] != 0 else F32(0)


@compiled
def _score(keys: Any, at: Any, stride: Any, count: Any, query: Any, head: Any, row: Any, scores: Any) -> None:
    """Scores of ``count`` tokens from ``at`` on; a key is widened once for all query heads of a group."""
    group, size = query.shape[1:]
    for n in range(count):
        for d in range(size):
            row[d] = widen(keys[at + d])
        for g in range(group):
            score = F32(0)
            for d in range(size):
                score += query[head, g, d] * row[d]
            scores[g, n] = score
        at += stride


@compiled
def _weigh(scores: Any, count: Any, peaks: Any, sums: Any, output: Any, head: Any) -> None:
    """Turn scores of a page into weights beside the largest score so far, by which what was added before is
    made smaller."""
    for g in range(len(peaks)):
        peak = peaks[g]
        for n in range(count):
            peak = scores[g, n] if scores[g, n] > peak else peak
        if peak > peaks[g]:
            smaller = exp(peaks[g] - peak)
            sums[g] *= smaller
            for d in range(output.shape[2]):
                output[head, g, d] *= smaller
            peaks[g] = peak
        for n in range(count):
            scores[g, n] = exp(scores[g, n] - peak)
            sums[g] += scores[g, n]


@compiled
def _add(
    values: Any, at: Any, stride: Any, count: Any, weights: Any, output: Any, head: Any, row: Any
) -> None:
    group, width = output.shape[1:]
    for n in range(count):
        for d in range(width):
            row[d] = widen(values[at + d])
        for g in range(group):
            weight = weights[g, n]
            for d in range(width):
                output[head, g, d] += weight * row[d]
        at += stride
