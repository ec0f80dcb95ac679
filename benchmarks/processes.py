"""Child servers that never outlive their purpose.

Each child leads a process group of its own. It is stopped by SIGTERM and then SIGKILL to that group alone: on
leaving a ``with`` block, at interpreter exit, and when this process is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from penstock.benchmarks.reaper import Reaper, signal_group

Progress = Callable[[str, float], None]
"""Called with the name of a child that is not ready yet and the seconds since it started."""

POLL_S = 0.25
LOG_TAIL_LINES = 20
LOG_ERRORS = 5
_ERROR_LINE = re.compile(r"\b(?:\w+\.)*\w*(?:Error|Exception|error): .*")
_COMPLAINT = re.compile(r"^.*\b(?:WARNING|ERROR|CRITICAL)\b.*$", re.MULTILINE)


class ServerError(RuntimeError):
    """A child server did not start, or ended when it should not have."""


@dataclass(slots=True)
class Port:
    """A TCP port of the loopback interface that no other process is given while this object holds it.

    The socket stays bound and never listens. A server that sets ``SO_REUSEADDR``, as HTTP servers and ZeroMQ
    do, can bind and listen beside it; the kernel gives the port to nobody who asks for any free one.
    """

    number: int
    _socket: socket.socket

    @classmethod
    def reserve(cls) -> Self:
        """Take a free port."""
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        return cls(holder.getsockname()[1], holder)

    def release(self) -> None:
        """Give the port back. Releasing twice does nothing."""
        self._socket.close()


@dataclass(slots=True, kw_only=True)
class Server:
    """One HTTP server in a child process. Use it as a context manager, or call ``stop`` yourself."""

    name: str
    command: Sequence[str]
    port: Port
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"
    grace_s: float = 15.0
    extra_ports: Sequence[Port] = ()
    _process: subprocess.Popen[bytes] | None = None
    _started_at: float = 0.0

    @property
    def url(self) -> str:
        """Base address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port.number}"

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group. Raises ServerError if never started."""
        if self._process is None:
            raise ServerError(f"{self.name} was never started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the child itself is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_at

    def start(self) -> Self:
        """Start the child; does not wait until it serves. Raises ServerError if the command cannot run."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    self.command,
                    env={**os.environ, **self.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ServerError(f"{self.name}: {self.command[0]}: {error.strerror}") from error
        _live.append(self)
        _reaper.guard(self._process.pid)
        self._started_at = time.monotonic()
        return self

    def check_alive(self) -> None:
        """Raise ServerError with the end of the log if the child has ended."""
        if not self.running:
            code = None if self._process is None else self._process.returncode
            raise ServerError(f"{self.name} ended with code {code}; {self.evidence()}")

    def ready(self) -> bool:
        """Whether the server answers its health check."""
        try:
            with urllib.request.urlopen(self.url + self.ready_path, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def evidence(self) -> str:
        """What the log says about a failure: the first distinct errors, then the last lines."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        errors = list(dict.fromkeys(_ERROR_LINE.findall(text)))[:LOG_ERRORS]
        tail = text.splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"{self.log} says:", *errors, "...", *tail])

    def said(self) -> int:
        """Bytes of log so far: a mark for ``complaints``."""
        return self.log.stat().st_size if self.log.exists() else 0

    def complaints(self, since: int = 0) -> list[str]:
        """Warnings and errors that the log holds from byte ``since`` on, each once and in order."""
        with self.log.open("rb") as log:
            log.seek(since)
            text = log.read().decode("utf-8", errors="replace")
        return list(dict.fromkeys(_COMPLAINT.findall(text)))

    def pause(self) -> None:
        """Stop the processes where they are: they answer nothing and take no processor until ``resume``."""
        signal_group(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the processes go on."""
        signal_group(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the process group: SIGTERM, ``grace_s`` seconds of patience, SIGKILL. Safe to call twice."""
        if self._process is not None:
            if self.running:
                signal_group(self._process.pid, signal.SIGTERM)
                self.resume()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(self.grace_s)
            # The leader may be gone while its children still hold the group.
            signal_group(self._process.pid, signal.SIGKILL)
            self._process.wait()
            _reaper.release(self._process.pid)
        for port in (self.port, *self.extra_ports):
            port.release()
        if self in _live:
            _live.remove(self)

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


_live: list[Server] = []
_reaper = Reaper()
_owner = os.getpid()


def running_servers() -> tuple[Server, ...]:
    """Servers of this process that were started and not stopped."""
    return tuple(_live)


def wait_until_ready(
    servers: Sequence[Server], *, timeout_s: float = 300.0, progress: Progress | None = None
) -> None:
    """Return when every server answers. Raises ServerError as soon as one ends, or after ``timeout_s``."""
    waiting = list(servers)
    deadline = time.monotonic() + timeout_s
    while waiting:
        for server in servers:
            server.check_alive()
        waiting = [server for server in waiting if not server.ready()]
        for server in waiting:
            if progress is not None:
                progress(server.name, server.age_s)
        if waiting and time.monotonic() > deadline:
            late = waiting[0]
            raise ServerError(
                f"{late.name} did not answer {late.ready_path} within {timeout_s:.0f} s; {late.evidence()}"
            )
        if waiting:
            time.sleep(POLL_S)


@contextlib.contextmanager
def termination_unwinds() -> Iterator[None]:
    """Let every signal that asks this process to end unwind the block, so that each ``with`` gets its exit.

    SIGTERM and SIGHUP become SystemExit. SIGINT becomes KeyboardInterrupt even where a shell has started this
    process in the background and made it ignore that signal. A SIGHUP that is ignored, as under nohup, stays
    ignored.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handlers: dict[signal.Signals, Any] = {signal.SIGTERM: leave, signal.SIGINT: signal.default_int_handler}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = leave
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@atexit.register
def _stop_all() -> None:
    # A forked child inherits the list, but not the servers.
    for server in list(_live) if os.getpid() == _owner else ():
        server.stop()
