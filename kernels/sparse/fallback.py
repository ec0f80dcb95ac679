"""Where attention stays dense: where sparse attention would save nothing, or is known to hurt."""

from __future__ import annotations

from enum import StrEnum

from penstock.kernels.sparse.config import SparseConfig


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
