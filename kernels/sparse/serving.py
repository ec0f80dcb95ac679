"""What an engine is told about sparse attention: keys of ``SparseConfig`` that pages use, and their own."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from penstock.kernels.sparse.config import GroupRule, Share, SparseConfig, Tokens

Selector = Literal["tactic"]


class ServingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sparse attention in an engine. Where a key stands in ``SparseConfig`` too, it means the same."""

    selector: Selector = "tactic"
    """How pages are chosen: ``tactic`` clusters keys within pages, estimates masses and measures them."""
    mass: Share = 0.9
    attained_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.985
    sink_tokens: Tokens = 4
    recent_tokens: Tokens = 64
    summary_tokens: Annotated[int, msgspec.Meta(ge=1, le=256)] = 4
    """Tokens of a page that one centroid stands for, on average."""
    summary_rounds: Annotated[int, msgspec.Meta(ge=0, le=10)] = 2
    """Rounds of k-means within a page; 0 leaves its runs of ``summary_tokens`` as they are."""
    group_rule: GroupRule = "ranked"
    least_tokens: Tokens = 8192
    budget: Share | None = None
    """Pages that each KV head reads at every step, of all; None for as many as have the mass."""
    estimate_rest: bool = True
    """Pages that are not read contribute the means of their values, where the attention kernel is ours."""
    dense_layers: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 2
    most_share: Share = 0.6
    calibration_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02
    """Share of (layer, step) in which one KV head of one request is measured."""
    calibration_window: Annotated[int, msgspec.Meta(ge=8, le=100_000)] = 512
    margin: Annotated[float, msgspec.Meta(ge=-2, le=6)] = 0.5
    spare_margin: Annotated[float, msgspec.Meta(ge=0, le=6)] = 0.08
    log_steps: Annotated[int, msgspec.Meta(ge=0)] = 1000
    """Sparse steps between two lines of the log; 0 for none."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0

    def __post_init__(self) -> None:
        # Built from Python, a struct is not validated by its types.
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass: given {self.mass!r}, allowed: above 0, at most 1")

    def core(self) -> SparseConfig:
        """The part that the selection core knows."""
        shared = set(SparseConfig.__struct_fields__) & set(self.__struct_fields__)
        return SparseConfig(**{name: getattr(self, name) for name in shared})
