"""How likely each token of a draft is to be accepted: by position, by request, shrunk to its class.

Token ``k`` is tried only if the ones before it were accepted, so what is learned at a position is the
acceptance given that it was reached. Beta counts with forgetting for each class and position; a request's own
counts move it away from its class as evidence comes in. What is unseen leans on a prior.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MOST_CLASSES = 256
MOST_REQUESTS = 4096
PRIOR_RATE = 0.6
PRIOR_WEIGHT = 4.0
CLASS_WEIGHT = 8.0
CLASS_DECAY = 0.998
REQUEST_DECAY = 0.98


class _Counts:
    """Decayed tries and acceptances at each position."""

    __slots__ = ("accepted", "tried")

    def __init__(self, positions: int) -> None:
        self.tried = [0.0] * positions
        self.accepted = [0.0] * positions

    def add(self, drafted: int, accepted: int, decay: float) -> None:
        for position in range(min(drafted, accepted + 1)):
            self.tried[position] = decay * self.tried[position] + 1.0
            self.accepted[position] = decay * self.accepted[position] + (position < accepted)


class AcceptanceEstimator:
    """Acceptance of drafts of up to ``most_tokens``; who drafted longest ago is forgotten first."""

    def __init__(self, most_tokens: int) -> None:
        self._positions = most_tokens
        self._classes: OrderedDict[str, _Counts] = OrderedDict()
        self._requests: OrderedDict[str, _Counts] = OrderedDict()

    def observe(self, request_id: str, class_name: str, drafted: int, accepted: int) -> None:
        """The first ``accepted`` of ``drafted`` tokens were right.

        Raises:
            ValueError: more were accepted than drafted, or one is negative.
        """
        if not 0 <= accepted <= drafted:
            raise ValueError(f"accepted: given {accepted}, allowed: 0 to drafted={drafted}")
        drafted = min(drafted, self._positions)
        self._find(self._classes, class_name, MOST_CLASSES).add(drafted, accepted, CLASS_DECAY)
        self._find(self._requests, request_id, MOST_REQUESTS).add(drafted, accepted, REQUEST_DECAY)

    def _find(self, table: OrderedDict[str, _Counts], name: str, most: int) -> _Counts:
        counts = table.get(name)
        if counts is None:
            counts = table[name] = _Counts(self._positions)
            if len(table) > most:
                table.popitem(last=False)
        table.move_to_end(name)
        return counts

    def survival(self, request_id: str, class_name: str) -> Sequence[float]:
        """Probability that each position is accepted together with all before it; never rises."""
        group, own = self._classes.get(class_name), self._requests.get(request_id)
        survival, reached, rate = [], 1.0, PRIOR_RATE
        for position in range(self._positions):
            if group is not None:
                weight = PRIOR_WEIGHT + group.tried[position]
                rate = (PRIOR_WEIGHT * rate + group.accepted[position]) / weight
            expected = rate
            if own is not None:
                weight = CLASS_WEIGHT + own.tried[position]
                expected = (CLASS_WEIGHT * rate + own.accepted[position]) / weight
            reached *= expected
            survival.append(reached)
        return survival

    def forget(self, request_id: str) -> None:
        """A request is gone."""
        self._requests.pop(request_id, None)

    def check_integrity(self) -> None:
        """Assert that memory is bounded and no position was accepted more often than tried."""
        assert len(self._classes) <= MOST_CLASSES
        assert len(self._requests) <= MOST_REQUESTS
        for counts in (*self._classes.values(), *self._requests.values()):
            pairs = zip(counts.accepted, counts.tried, strict=True)
            assert all(0 <= accepted <= tried + 1e-9 for accepted, tried in pairs)
