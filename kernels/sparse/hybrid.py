"""Clusters as a coarse filter, quantised keys within them, and centroids for what is left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.kernels.sparse.attention import Partial, logits, weighted
from penstock.kernels.sparse.clusters import Clusters, bounded, log_masses
from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.pages import choose
from penstock.kernels.sparse.quantised import QuantisedKeys, rotation
from penstock.kernels.sparse.selection import Selection, always
from penstock.kernels.sparse.top_p import top_p


@dataclass(frozen=True, slots=True)
class HybridIndex:
    """Clusters of rotated keys, the keys' differences from their centroids in a few bits, and broken keys.

    ``broken`` bool [H, m] marks keys that are not finite. They are always read: sparse attention then says
    NaN where dense attention does, and elsewhere they disturb nothing.
    """

    clusters: Clusters
    keys: QuantisedKeys
    broken: torch.Tensor

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self.clusters.tokens

    @property
    def nbytes(self) -> int:
        """Memory in bytes as a device keeps it: means in 16 bits, order in 32."""
        clusters = self.clusters
        means = clusters.centroids.numel() + clusters.values.numel() + clusters.spreads.numel()
        return self.keys.nbytes + 2 * means + 4 * clusters.order.numel()

    def followed_by(self, later: HybridIndex) -> HybridIndex:
        """This, then that of the tokens that follow."""
        codes, factors = (
            torch.cat([getattr(self.keys, name), getattr(later.keys, name)], 1)
            for name in ("codes", "factors")
        )
        return HybridIndex(
            self.clusters.followed_by(later.clusters),
            QuantisedKeys(codes, factors, self.keys.bits, self.keys.size),
            torch.cat([self.broken, later.broken], 1),
        )


@dataclass(frozen=True, slots=True)
class Hybrid:
    """Top-p over quantised scores; see ``docs/sparse-attention.md``."""

    config: SparseConfig
    name: str = "hybrid"
    page_tokens: int = 1
    """Tokens that are read together, by position."""

    def index(self, keys: torch.Tensor, values: torch.Tensor) -> HybridIndex:
        """Segment by segment, so that an index of a prefix is a prefix of the index."""
        step = self.config.segment_tokens
        starts = range(0, max(1, keys.shape[1]), step)
        found = [self._segment(keys[:, at : at + step], values[:, at : at + step]) for at in starts]
        whole = found[0]
        for later in found[1:]:
            whole = whole.followed_by(later)
        return whole

    def _segment(self, keys: torch.Tensor, values: torch.Tensor) -> HybridIndex:
        config = self.config
        broken = ~keys.isfinite().all(-1)
        clean = torch.where(broken[..., None], 0.0, keys.float())
        turned = clean @ rotation(keys.shape[-1], config.seed).to(keys.device)
        clusters = bounded(
            turned, values.float(), config.cluster_tokens, config.kmeans_iterations, config.seed
        )
        size = keys.shape[-1]
        sorted_keys = turned.gather(1, clusters.order[..., None].expand(-1, -1, size))
        centres = clusters.centroids.gather(1, clusters.owner[..., None].expand(-1, -1, size))
        return HybridIndex(clusters, QuantisedKeys.of(sorted_keys - centres, config.key_bits), broken)

    def select(self, index: HybridIndex, query: torch.Tensor, keys: torch.Tensor, amount: float) -> Selection:
        """Share of mass: ``amount``; a calibrated margin goes into it (``Calibration.ask``)."""
        heads, tokens, _ = keys.shape
        kept = always(self.config, tokens, index.tokens).expand(heads, -1).clone()
        if index.tokens == 0:
            return Selection(kept, torch.zeros(heads, dtype=torch.int64))
        kept[:, : index.tokens] |= index.broken
        # A query that is not finite makes its output so, whatever is read; the choice must only be valid.
        asked = query.float().nan_to_num(0.0, 0.0, 0.0)
        turned = asked @ rotation(keys.shape[-1], self.config.seed).to(keys.device)
        masses = self._masses(index.clusters, turned)
        scores = self._scores(index, turned)
        near = self._near(index, masses, scores, amount)
        scores = scores.masked_fill(~near.gather(1, index.clusters.owner)[:, None], -torch.inf)
        far = masses.masked_fill(near[:, None], -torch.inf)
        weights = _shares(self._known(index, logits(asked, keys), kept, scores, far), far)
        wanted = torch.full(query.shape[:2], amount)
        chosen = choose(self.config, weights, kept, wanted, page_tokens=self.page_tokens)
        scored = (near * index.clusters.sizes).sum(-1).long()
        rest = self._rest(index, scores, far, chosen) if self.config.estimate_rest else None
        return Selection(chosen, scored, rest)

    def _masses(self, clusters: Clusters, turned: torch.Tensor) -> torch.Tensor:
        """Logs of the estimated sums of exponentials of each cluster, [H, G, C]."""
        products = turned @ clusters.centroids.transpose(1, 2)
        lengths = turned.square().sum(-1, keepdim=True)
        deviations = (lengths * clusters.spreads[:, None]).sqrt()
        return log_masses(products, deviations, clusters.sizes[:, None])

    def _near(
        self, index: HybridIndex, masses: torch.Tensor, scores: torch.Tensor, amount: float
    ) -> torch.Tensor:
        """Clusters whose tokens are scored one by one, bool [H, C].

        What they turn out to hold shows how much the others may: where the first choice holds less than was
        thought, a second one follows. (All scores are at hand here; a kernel computes those of ``near``
        ones.)
        """
        owner = index.clusters.owner[:, None].expand_as(scores)
        peak = scores.amax(-1, keepdim=True)
        sums = torch.zeros_like(masses).scatter_add_(2, owner, (scores - peak).exp())
        held = sums.log() + peak
        wanted = torch.full(masses.shape[:2], 1 - (1 - amount) * self.config.coarse_slack)
        near = torch.zeros(masses.shape[0], masses.shape[2], dtype=torch.bool)
        for _ in range(self.config.coarse_rounds):
            likely = torch.where(near[:, None], held, masses)
            near |= top_p(likely.softmax(-1).nan_to_num(0.0), wanted).any(1)
        return near

    def _scores(self, index: HybridIndex, turned: torch.Tensor) -> torch.Tensor:
        """Estimated scores in the order of the clusters, [H, G, m]."""
        owner = index.clusters.owner[:, None].expand(-1, turned.shape[1], -1)
        products = (turned @ index.clusters.centroids.transpose(1, 2)).gather(2, owner)
        return products + turned @ index.keys.restored().transpose(1, 2)

    def _known(
        self,
        index: HybridIndex,
        exact: torch.Tensor,
        kept: torch.Tensor,
        scores: torch.Tensor,
        far: torch.Tensor,
    ) -> torch.Tensor:
        """Scores in the order of the tokens, [H, G, n]; -inf where unknown.

        Exact ones are used of tokens that are read anyway, and of those whose weight is largest in any query
        head, where an error would matter most.
        """
        exact = exact.nan_to_num(0.0, 0.0, 0.0)
        place = index.clusters.order[:, None].expand_as(scores)
        known = torch.full_like(exact, -torch.inf).scatter_(2, place, scores)
        known = torch.where(kept[:, None], exact, known)
        weights = _shares(known, far).amax(1)
        heaviest = weights.topk(min(self.config.exact_tokens, weights.shape[-1]), -1).indices
        heavy = torch.zeros_like(kept).scatter_(1, heaviest, True) & (weights > 0)
        return torch.where(heavy[:, None], exact, known)

    def _rest(
        self, index: HybridIndex, scores: torch.Tensor, far: torch.Tensor, chosen: torch.Tensor
    ) -> Partial:
        """Attention over the tokens that are not read, each with the mean value of its cluster."""
        clusters = index.clusters
        read = chosen[:, : index.tokens].gather(1, clusters.order)[:, None]
        left = scores.masked_fill(read, -torch.inf)
        peak = torch.maximum(left.amax(-1), far.amax(-1)).nan_to_num(neginf=0.0)[..., None]
        owner = clusters.owner[:, None].expand_as(left)
        sums = torch.zeros_like(far).scatter_add_(2, owner, (left - peak).exp())
        return weighted(torch.logaddexp(sums.log() + peak, far), clusters.values)


def _shares(known: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    """Shares of the mass [H, G, n] of tokens with scores ``known``, beside clusters of log masses ``far``."""
    total = torch.logaddexp(known.logsumexp(-1), far.logsumexp(-1))
    return (known - total[..., None]).exp().nan_to_num(0.0)
