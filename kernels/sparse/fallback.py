"""Where attention stays dense: where sparse attention would save nothing, or is known to hurt."""

from __future__ import annotations

from enum import StrEnum

import torch

from penstock.kernels.sparse.attention import Partial
from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.selection import Selection


class Reason(StrEnum):
    """Why a layer or a KV head is dense."""

    SHORT_CONTEXT = "short context"
    FIRST_LAYERS = "first layers"
    NOTHING_SAVED = "nothing saved"


def reason_before(config: SparseConfig, layer: int, tokens: int) -> Reason | None:
    """Why ``layer`` is dense for a request of ``tokens``, before anything is selected; None if sparse."""
    if layer < config.dense_layers:
        return Reason.FIRST_LAYERS
    return Reason.SHORT_CONTEXT if tokens < config.least_tokens else None


def widened(config: SparseConfig, selection: Selection) -> tuple[Selection, torch.Tensor]:
    """The selection with KV heads dense that would read most tokens, and which those are, bool [H]."""
    tokens = selection.tokens
    dense = tokens.sum(1) > config.most_share * tokens.shape[1]
    rest = selection.rest
    if rest is not None:
        lse = rest.lse.masked_fill(dense[:, None], -torch.inf)
        rest = Partial(rest.output.masked_fill(dense[:, None, None], 0.0), lse)
    return Selection(tokens | dense[:, None], selection.scored, rest), dense
