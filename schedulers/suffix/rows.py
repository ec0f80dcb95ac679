"""Which request a row of token ids belongs to, where nobody says: known by its content.

A worker's rows move when requests come and go. A row that now holds ``n`` tokens, ``k`` of them new, goes on
from the text that had ``n - k`` tokens and the same head and tail. Two requests with equal texts are the same
to whoever drafts from texts, so that taking one for the other costs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HEAD, TAIL = 16, 32

Key = tuple[int, bytes, bytes]


class _Row(NamedTuple):
    key: Key
    step: int


class RowTexts:
    """Names for texts that grow. Those that did not grow for ``idle_steps``, and the longest idle of more
    than ``most``, are given up."""

    def __init__(self, most: int, idle_steps: int = 256) -> None:
        self._most = most
        self._idle_steps = idle_steps
        self._step = 0
        self._made = 0
        self._rows: OrderedDict[str, _Row] = OrderedDict()
        self._names: dict[Key, list[str]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def begin_step(self) -> list[str]:
        """Another step begins; returns the names that are given up."""
        self._step += 1
        given_up = []
        while self._rows:
            name, row = next(iter(self._rows.items()))
            if len(self._rows) <= self._most and self._step - row.step <= self._idle_steps:
                break
            self._take(name)
            given_up.append(name)
        return given_up

    def find(self, tokens: NDArray[np.integer], before: int, after: int) -> tuple[str, bool]:
        """The name of what was ``tokens[:before]`` and is ``tokens[:after]`` now, and whether it is new."""
        names = self._names.get(_key(tokens, before))
        if names:
            name, new = names[-1], False
            self._take(name)
        else:
            self._made += 1
            name, new = f"t{self._made}", True
        key = _key(tokens, after)
        self._rows[name] = _Row(key, self._step)
        self._names.setdefault(key, []).append(name)
        return name, new

    def _take(self, name: str) -> None:
        key = self._rows.pop(name).key
        names = self._names[key]
        names.remove(name)
        if not names:
            del self._names[key]

    def check_integrity(self) -> None:
        """Assert that each name has one key, and each key its names."""
        assert sorted(self._rows) == sorted(name for names in self._names.values() for name in names)
        assert all(name in self._names[row.key] for name, row in self._rows.items())


def _key(tokens: NDArray[np.integer], length: int) -> Key:
    head = tokens[: min(HEAD, length)]
    return length, head.tobytes(), tokens[max(0, length - TAIL) : length].tobytes()
