"""Ends process groups whose owner has died, in whatever way.

The owner starts this file as a process of its own and keeps the writing end of its standard input. ``+ID``
puts a process group under guard, ``-ID`` takes it out. When the owner is gone the pipe closes, and every
group that is still under guard gets SIGTERM and, after a grace period, SIGKILL.

Run by path and isolated from any site packages: standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

GRACE_S = 5.0
POLL_S = 0.1


class Reaper:
    """The owner's end. The guarding process is started with the first group."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def guard(self, group: int) -> None:
        """End ``group`` if this process dies."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._tell(f"+{group}\n")

    def release(self, group: int) -> None:
        """Leave ``group`` alone from here on."""
        if self._process is not None:
            self._tell(f"-{group}\n")

    def _tell(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        # Somebody may have ended the guard; the servers are no worse for it.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False if nobody is left in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def watch(lines: Iterable[str]) -> None:
    """Follow the owner's lines to their end, then end what is under guard."""
    guarded: set[int] = set()
    for line in lines:
        change = guarded.add if line[0] == "+" else guarded.discard
        change(int(line[1:]))
    deadline = time.monotonic() + GRACE_S
    left = {group for group in guarded if signal_group(group, signal.SIGTERM)}
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = {group for group in left if signal_group(group, 0)}
    for group in left:
        signal_group(group, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin)
