"""Configuration of sparse attention: one frozen struct, the same keys in every engine."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=100_000_000)]
GroupRule = Literal["cover", "ranked", "union", "mean"]


class SparseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All knobs of sparse attention. Sizes are in tokens."""

    mass: Share = 0.9
    """Attention mass that the chosen tokens of a query head are to have."""
    attained_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.985
    """Share of (layer, query head, step) in which they are to have it."""
    sink_tokens: Tokens = 4
    """First tokens of a request, always read."""
    recent_tokens: Tokens = 64
    """Last tokens, always read, besides those that no cluster has yet."""
    cluster_tokens: Annotated[int, msgspec.Meta(ge=4, le=256)] = 32
    """Tokens that share a centroid."""
    kmeans_iterations: Annotated[int, msgspec.Meta(ge=1, le=100)] = 10
    segment_tokens: Annotated[int, msgspec.Meta(ge=256, le=1_048_576)] = 8192
    """Tokens that are clustered together: the cost of k-means grows with its square."""
    recluster_tokens: Annotated[int, msgspec.Meta(ge=64, le=1_048_576)] = 2048
    """Decoded tokens after which the tail is clustered."""
    key_bits: Literal[2, 4, 8] = 4
    """Bits a channel of the key copy by which tokens are scored."""
    coarse_slack: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    """Clusters are left unscored while they have less than this part of the mass that may be missed."""
    coarse_rounds: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    """Times that clusters are chosen, each knowing what the ones before turned out to hold."""
    exact_tokens: Tokens = 128
    """Tokens of the largest estimated weights whose scores are then made exact."""
    group_rule: GroupRule = "cover"
    """How the query heads of a KV head agree on tokens."""
    estimate_rest: bool = True
    """Tokens that are not read contribute through the centroids of their values."""
    least_tokens: Tokens = 4096
    """Shorter contexts are dense."""
    dense_layers: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 2
    """First layers, always dense."""
    most_share: Share = 0.6
    """A KV head that would read more of its tokens is dense."""
    calibration_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02
    """Share of (layer, query head, step) whose exact mass is measured."""
    calibration_window: Annotated[int, msgspec.Meta(ge=8, le=100_000)] = 512
    """Measurements a layer that the margin rests on."""
    margin: Annotated[float, msgspec.Meta(ge=-2, le=6)] = 0.25
    """Margin before anything is measured, in units of log(P / (1 - P))."""
    spare_margin: Annotated[float, msgspec.Meta(ge=0, le=6)] = 0.08
    """Added to the margin that was measured, for what drifts between requests; in the same units."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0

    def __post_init__(self) -> None:
        # Built from Python, a struct is not validated by its types.
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass: given {self.mass!r}, allowed: above 0, at most 1")
        if self.recluster_tokens > self.segment_tokens:
            raise ValueError(
                f"recluster_tokens: given {self.recluster_tokens}, "
                f"allowed: at most segment_tokens={self.segment_tokens}"
            )
        if self.cluster_tokens > self.recluster_tokens:
            raise ValueError(
                f"cluster_tokens: given {self.cluster_tokens}, "
                f"allowed: at most recluster_tokens={self.recluster_tokens}"
            )
