"""vLLM's way of using NIXL and FlowKV's, each in two processes of its own that stand still out of turn.

An agent as NixlConnector makes it keeps threads that never sleep, at both ends. In one process with FlowKV's
agent they would take the processor from its reads, which no FlowKV server suffers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Collection, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import msgspec

from penstock.benchmarks.flowkv_memory import Family, Shape, connected_pools
from penstock.benchmarks.flowkv_movers import Job, check, make_movers
from penstock.benchmarks.reaper import Reaper, signal_group
from penstock.connectors.runs import Run


class Order(msgspec.Struct, frozen=True):
    """One request for one mover: runs at the source and at the target, in token order."""

    mover: str
    source: list[Run]
    target: list[Run]


class Took(msgspec.Struct, frozen=True):
    """What one request took in the reading process: all its threads' processor time, calls, descriptors."""

    wall_s: float
    cpu_s: float
    calls: int
    descriptors: int


class SideError(RuntimeError):
    """The processes of one side are gone; what they wrote before says why."""


def serve(
    pipe: Connection,
    family: Family,
    shape: Shape,
    source_blocks: int,
    target_blocks: int,
    names: Collection[str] | None,
) -> None:
    """Body of the reading process: connect, prove every mover right, then move what is ordered."""
    os.setsid()
    with connected_pools(family, shape, source_blocks, target_blocks) as pools, contextlib.suppress(EOFError):
        movers = {mover.name: mover for mover in make_movers(pools, shape, names)}
        for mover in movers.values():
            check(mover, pools, shape)
        pipe.send_bytes(msgspec.msgpack.encode(list(movers)))
        while True:
            order = msgspec.msgpack.decode(pipe.recv_bytes(), type=Order)
            job = Job(order)
            cpu, wall = time.process_time(), time.perf_counter()
            calls, descriptors = movers[order.mover].move(job)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            pipe.send_bytes(msgspec.msgpack.encode(Took(wall, cpu, calls, descriptors)))


class Side:
    """The processes of one family. They run while they start and while they move, and stand still after."""

    _reaper = Reaper()

    def __init__(
        self,
        family: Family,
        shape: Shape,
        source_blocks: int,
        target_blocks: int,
        names: Collection[str] | None,
    ) -> None:
        self.family = family
        self.movers: list[str] = []
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve,
            args=(theirs, family, shape, source_blocks, target_blocks, names),
            name=f"{family} side",
        )
        self._process.start()
        theirs.close()
        self._group = self._process.pid or 0

    def wait_until_ready(self) -> None:
        """Wait for the pools and the check of every mover; then the side rests.

        Raises:
            SideError: it did not come up.
        """
        with self._gone():
            self.movers = msgspec.msgpack.decode(self._pipe.recv_bytes(), type=list[str])
        self._reaper.guard(self._group)
        signal_group(self._group, signal.SIGSTOP)

    def move(self, mover: str, job: Job) -> Took:
        """Wake up, move one request, rest.

        Raises:
            SideError: the move failed.
        """
        signal_group(self._group, signal.SIGCONT)
        with self._gone():
            self._pipe.send_bytes(msgspec.msgpack.encode(Order(mover, job.source, job.target)))
            took = msgspec.msgpack.decode(self._pipe.recv_bytes(), type=Took)
        signal_group(self._group, signal.SIGSTOP)
        return took

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        if self.movers:
            signal_group(self._group, signal.SIGCONT)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._reaper.release(self._group)

    @contextlib.contextmanager
    def _gone(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            raise SideError(f"the processes of the {self.family} side are gone") from error


@contextlib.contextmanager
def both_sides(
    shape: Shape, source_blocks: int, target_blocks: int, names: Collection[str] | None = None
) -> Iterator[list[Side]]:
    """Both families, ready and at rest, with all their movers or those of ``names``.

    Raises:
        SideError: one did not come up.
    """
    with contextlib.ExitStack() as stack:
        families: tuple[Family, ...] = ("stock", "FlowKV")
        sides = [stack.enter_context(Side(f, shape, source_blocks, target_blocks, names)) for f in families]
        for side in sides:
            side.wait_until_ready()
        yield sides
