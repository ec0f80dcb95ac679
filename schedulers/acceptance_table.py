"""How likely each token of a draft is to be accepted: by position, by request, shrunk to its class.

Token ``k`` is tried only if the ones before it were accepted, so what is learned at a position is the
acceptance given that it was reached. Beta counts with forgetting for each class and position; a request's own
counts move it away from its class as evidence comes in. What is unseen leans on a prior.

All in arrays: with hundreds of requests in steps of milliseconds, a loop over requests and positions costs
more than what it decides about. Requests of a class that one step verified have no order: each counts as if
it came at any place among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
MOST_CLASSES = 256
PRIOR_RATE = 0.6
PRIOR_WEIGHT = 4.0
CLASS_WEIGHT = 8.0
CLASS_DECAY = 0.998
REQUEST_DECAY = 0.98
FIRST_ROWS = 64
NOBODY = -1
OTHERS = 0
"""The class of all classes beyond ``MOST_CLASSES``."""


class AcceptanceTable:
    """Acceptance of drafts of up to ``most_tokens``. A request has a row from ``row`` to ``forget``."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self._positions = np.arange(most_tokens)
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._tried = np.zeros((0, most_tokens))
        self._accepted = np.zeros((0, most_tokens))
        self._class = np.zeros(0, dtype=np.int64)
        self._classes: dict[str, int] = {}
        self._class_tried = np.zeros((MOST_CLASSES, most_tokens))
        self._class_accepted = np.zeros((MOST_CLASSES, most_tokens))
        self._rates = np.full((MOST_CLASSES, most_tokens), PRIOR_RATE)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, request_id: str, class_name: str) -> int:
        """The request's row, made when it is first asked for."""
        row = self._rows.get(request_id)
        if row is None:
            if not self._free:
                self._grow()
            row = self._rows[request_id] = self._free.pop()
            self._tried[row] = self._accepted[row] = 0.0
            self._class[row] = self._class_of(class_name)
        return row

    def find(self, request_ids: Sequence[str]) -> Ints:
        """Rows of requests, ``NOBODY`` where one has none."""
        return np.array(list(map(self._rows.get, request_ids, repeat(NOBODY))), dtype=np.int64)

    def forget(self, request_id: str) -> None:
        """A request is gone."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._free.append(row)

    def observe(self, rows: Ints, drafted: Ints, accepted: Ints) -> None:
        """Of ``drafted`` tokens of each row the first ``accepted`` were right; no row twice.

        Raises:
            ValueError: more were accepted than drafted, or one is negative.
        """
        if len(rows) == 0:
            return
        if (accepted < 0).any() or (accepted > drafted).any():
            raise ValueError("accepted: allowed: 0 to drafted")
        reached = np.minimum(np.minimum(drafted, accepted + 1), self.most_tokens)
        accepted = np.minimum(accepted, reached)
        tried = self._positions < reached[:, None]
        right = self._positions < accepted[:, None]
        decay = np.where(tried, REQUEST_DECAY, 1.0)
        self._tried[rows] = decay * self._tried[rows] + tried
        self._accepted[rows] = decay * self._accepted[rows] + right
        self._observe_classes(self._class[rows], reached, accepted)

    def survival(self, rows: Ints) -> Floats:
        """``[rows, positions]``: probability that a position is accepted with all before it; rows fall."""
        expected = CLASS_WEIGHT * self._rates[self._class[rows]]
        expected += self._accepted[rows]
        expected /= CLASS_WEIGHT + self._tried[rows]
        for position in range(1, self.most_tokens):
            expected[:, position] *= expected[:, position - 1]
        return expected

    def _observe_classes(self, classes: Ints, reached: Ints, accepted: Ints) -> None:
        number = self._deeper(classes, reached)
        came = self._deeper(classes, accepted)
        kept = CLASS_DECAY**number
        added = (1.0 - kept) / (1.0 - CLASS_DECAY)
        came_added = added * came / np.maximum(number, 1)
        known = len(number)
        self._class_tried[:known] = kept * self._class_tried[:known] + added
        self._class_accepted[:known] = kept * self._class_accepted[:known] + came_added
        self._estimate(known)

    def _deeper(self, classes: Ints, depths: Ints) -> Ints:
        """``[classes, positions]``: how many rows of each class reach beyond each position."""
        shape = (len(self._classes) + 1, self.most_tokens + 1)
        places = classes * shape[1] + depths
        ends = np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)
        deeper: Ints = np.cumsum(ends[:, :0:-1], axis=1)[:, ::-1]
        return deeper

    def _estimate(self, classes: int) -> None:
        accepted = self._class_accepted[:classes]
        tried = PRIOR_WEIGHT + self._class_tried[:classes]
        rates = self._rates[:classes]
        rate: float | Floats = PRIOR_RATE
        for position in range(self.most_tokens):
            rate = (PRIOR_WEIGHT * rate + accepted[:, position]) / tried[:, position]
            rates[:, position] = rate

    def _class_of(self, name: str) -> int:
        if name not in self._classes and len(self._classes) + 1 < MOST_CLASSES:
            self._classes[name] = len(self._classes) + 1
        return self._classes.get(name, OTHERS)

    def _grow(self) -> None:
        size = len(self._class)
        more = max(FIRST_ROWS, size)
        empty = np.zeros((more, self.most_tokens))
        self._tried = np.concatenate([self._tried, empty])
        self._accepted = np.concatenate([self._accepted, empty])
        self._class = np.concatenate([self._class, np.zeros(more, dtype=np.int64)])
        self._free = list(range(size + more - 1, size - 1, -1))

    def check_integrity(self) -> None:
        """Assert that rows are used once, and that no position was accepted more often than tried."""
        used = sorted([*self._rows.values(), *self._free])
        assert used == list(range(len(self._class)))
        assert (self._accepted <= self._tried + 1e-9).all()
        assert (self._class_accepted <= self._class_tried + 1e-9).all()
        assert len(self._classes) < MOST_CLASSES
