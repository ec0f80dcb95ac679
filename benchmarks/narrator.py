"""Says what a long command is doing: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console

LINE_EVERY_S = 10.0


class Narrator:
    """Tells steps and how long they took."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Callable[[str], None]]:
        """Yield a function that shows how far the step is. A step that fails ends without a word."""
        begin = shown = self._clock()
        with self._console.status(what) as status:

            def tell(text: str) -> None:
                nonlocal shown
                status.update(f"{what}: {text}")
                if not self._console.is_terminal and self._clock() - shown >= LINE_EVERY_S:
                    shown = self._clock()
                    self._console.print(f"{what}: {text}", highlight=False, soft_wrap=True)

            yield tell
        self._console.print(f"{what}: done in {self._clock() - begin:.1f} s", highlight=False, soft_wrap=True)
