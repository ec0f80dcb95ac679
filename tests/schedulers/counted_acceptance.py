"""What the acceptance table promises, said by loops over one request at a time: slow and obviously right."""

from __future__ import annotations

from collections import defaultdict

from penstock.schedulers.acceptance_table import (
    CLASS_DECAY,
    CLASS_WEIGHT,
    PRIOR_RATE,
    PRIOR_WEIGHT,
    REQUEST_DECAY,
)


class CountedAcceptance:
    """Decayed tries and acceptances of each position, by class and by request."""

    def __init__(self, positions):
        self.positions = positions
        self.counts = defaultdict(lambda: [[0.0, 0.0] for _ in range(positions)])

    def observe(self, request_id, class_name, drafted, accepted):
        for key, decay in (("class", class_name), CLASS_DECAY), (("request", request_id), REQUEST_DECAY):
            for position in range(min(drafted, accepted + 1, self.positions)):
                tried, right = self.counts[key][position]
                self.counts[key][position] = [decay * tried + 1, decay * right + (position < accepted)]

    def survival(self, request_id, class_name):
        survival, reached, rate = [], 1.0, PRIOR_RATE
        of_class, of_request = self.counts["class", class_name], self.counts["request", request_id]
        for (tried, right), (own_tried, own_right) in zip(of_class, of_request, strict=True):
            rate = (PRIOR_WEIGHT * rate + right) / (PRIOR_WEIGHT + tried)
            reached *= (CLASS_WEIGHT * rate + own_right) / (CLASS_WEIGHT + own_tried)
            survival.append(reached)
        return survival
