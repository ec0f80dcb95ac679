"""Work that no step waits for, kept until the device computes one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class Later:
    """Calls put off, made in the order in which they came up. Arguments are those of the moment they came up;
    what a call reads beside them is as it is when the call is made."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], object]] = deque()

    def put(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call it at the next ``do``."""
        self._calls.append(lambda: call(*args, **kwargs))

    def do(self) -> None:
        """Make all calls that were put off, each once."""
        calls = self._calls
        while calls:
            calls.popleft()()

    def __len__(self) -> int:
        return len(self._calls)
