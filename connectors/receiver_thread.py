"""Drives one rank's receiver on a thread of its own, so that the engine's step never waits for bytes."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections import deque

from penstock.connectors.errors import FlowKVError
from penstock.connectors.receiver import Load, Outcome, Receiver

logger = logging.getLogger(__name__)

READING_PAUSE_S = 0.0001
"""Pause between polls while bytes move: long enough to leave the interpreter to the engine's step."""
ASKING_PAUSE_S = 0.001
"""Longest wait for a control reply before looking at new loads."""
CLOSING_S = 5.0
"""Longest wait for the thread to end, and then for transfers to let themselves be cancelled."""
CANCELLING_PAUSE_S = 0.01
"""Pause before a transfer that could not be cancelled is asked again."""


class ReceiverDiedError(FlowKVError):
    """The receiver broke off by a defect: no load of this rank will end. The cause is chained."""


class ReceiverThread:
    """Thread-safe front of a :class:`Receiver`; idle, it blocks and costs nothing."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._inbox: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._outbox: deque[Outcome] = deque()
        self._died_of: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="flowkv-receiver", daemon=True)
        self._thread.start()

    def submit(self, load: Load) -> None:
        """Start a load; its outcome follows.

        Raises:
            ReceiverDiedError: it would never follow.
        """
        self._require_alive()
        self._inbox.put(load)

    def outcomes(self) -> list[Outcome]:
        """Loads that ended since the last call, in the order in which they ended.

        Raises:
            ReceiverDiedError: the loads under way will never end.
        """
        self._require_alive()
        return [self._outbox.popleft() for _ in range(len(self._outbox))]

    def close(self) -> bool:
        """Stop and abandon the loads under way; True once none of them can write to memory any more."""
        self._inbox.put(None)
        self._thread.join(CLOSING_S)
        if self._thread.is_alive():
            logger.error("FlowKV's receiver does not end; it is left as it is")
            return False
        deadline = time.monotonic() + CLOSING_S
        while active := self._receiver.close():
            if time.monotonic() >= deadline:
                logger.error("FlowKV cannot cancel %d transfers; they may still write", active)
                return False
            time.sleep(CANCELLING_PAUSE_S)
        return True

    def _require_alive(self) -> None:
        if self._died_of is not None:
            raise ReceiverDiedError("FlowKV's receiver has died; its loads will never end") from self._died_of

    def _run(self) -> None:
        try:
            self._drive(self._receiver)
        finally:
            self._died_of = sys.exception()

    def _drive(self, receiver: Receiver) -> None:
        while self._take_loads():
            receiver.step(0.0 if receiver.is_reading else ASKING_PAUSE_S)
            self._outbox.extend(receiver.outcomes())
            if receiver.is_reading:
                time.sleep(READING_PAUSE_S)

    def _take_loads(self) -> bool:
        """Submit what has come, waiting only when nothing is pending; False when it is time to stop."""
        block = not self._receiver.num_pending
        while True:
            try:
                load = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if load is None:
                return False
            self._receiver.submit(load)
            block = False
