"""Whether to draft at all, and how much: allocation while it pays, and rare probes while it does not.

Off means no draft and no cost. Since acceptance is only seen by drafting, a short draft of one request is
tried now and then, for at most one percent of the time that was served.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.schedulers.acceptance import AcceptanceEstimator
from penstock.schedulers.drafts import Drafting, StepSeconds, fastest

PROBE_SHARE = 0.01
PROBE_TOKENS = 2
LEAST_GAIN = 0.01
MOST_CREDIT_S = 1.0


class DraftPolicy:
    """Draft lengths for each step, and what came of them."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.estimator = AcceptanceEstimator(most_tokens)
        self._credit_s = 0.0
        self._probed: dict[str, int] = {}
        self.drafted = self.accepted = self.probes = 0
        self.served_s = self.probing_s = 0.0

    def lengths(
        self,
        drafting: Sequence[Drafting],
        seconds: StepSeconds,
        *,
        most_tokens: int,
        other_worth: float = 0.0,
        opportunity: float = 0.0,
    ) -> dict[str, int]:
        """Draft tokens by request; empty where drafting does not pay."""
        plain_s = seconds(0, 0)
        self.served_s += plain_s
        self._credit_s = min(MOST_CREDIT_S, self._credit_s + PROBE_SHARE * plain_s)
        if not drafting or most_tokens < 1:
            return {}
        found = fastest(
            drafting,
            seconds,
            most_tokens=most_tokens,
            longest=self.most_tokens,
            other_worth=other_worth,
            opportunity=opportunity,
        )
        if found.gain >= LEAST_GAIN:
            return found.tokens
        return self._probe(drafting, seconds, min(PROBE_TOKENS, most_tokens, self.most_tokens), plain_s)

    def _probe(
        self, drafting: Sequence[Drafting], seconds: StepSeconds, tokens: int, plain_s: float
    ) -> dict[str, int]:
        """A draft of the request that was probed least, if there is credit for its whole cost."""
        cost_s = max(0.0, seconds(tokens, tokens) - plain_s)
        if cost_s > self._credit_s or cost_s <= 0:
            return {}
        self._credit_s -= cost_s
        self.probing_s += cost_s
        self.probes += 1
        self._probed = {r.request_id: self._probed.get(r.request_id, 0) for r in drafting}
        chosen = min(self._probed, key=lambda name: (self._probed[name], name))
        self._probed[chosen] += 1
        return {chosen: tokens}

    def observe(self, request_id: str, class_name: str, drafted: int, accepted: int) -> None:
        """What verification said of a draft.

        Raises:
            ValueError: more were accepted than drafted, or one is negative.
        """
        self.estimator.observe(request_id, class_name, drafted, accepted)
        self.drafted += drafted
        self.accepted += accepted

    def forget(self, request_id: str) -> None:
        """A request is gone."""
        self.estimator.forget(request_id)
        self._probed.pop(request_id, None)
