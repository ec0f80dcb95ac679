"""A prefill and a decode server of stock SGLang with one transfer backend, and SGLang's own router."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_pair import eventually
from sglang_server import ask, sglang_server

from penstock.benchmarks.processes import Port, Server
from penstock.benchmarks.reaper import signal_group
from penstock.benchmarks.servers import serving

PAGE = 16


@dataclass(frozen=True, slots=True)
class SglangPair:
    """Two servers, and where the bootstrap server of each listens if it is the prefill server."""

    prefill: Server
    decode: Server
    bootstrap: Port
    others_bootstrap: Port

    def swapped(self) -> SglangPair:
        """The pair after a change of roles."""
        return SglangPair(self.decode, self.prefill, self.others_bootstrap, self.bootstrap)

    def generate(self, prompt: Sequence[int], tokens: int, *, room: int | None = None) -> dict[str, Any]:
        """What decode answers to a greedy request that both servers get, as a router would send it.
        Raises Refused."""
        body = self.body(prompt, tokens, room)
        with ThreadPoolExecutor(1) as pool:
            first: Future[Any] = pool.submit(ask, self.prefill, "/generate", body)
            try:
                answer: dict[str, Any] = ask(self.decode, "/generate", body)
            finally:
                with contextlib.suppress(Exception):
                    first.result()
        return answer

    def body(self, prompt: Sequence[int], tokens: int, room: int | None = None) -> dict[str, Any]:
        """The request, with the room in which the two servers meet."""
        return {
            "input_ids": list(prompt),
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap.number,
            "bootstrap_room": random.getrandbits(62) if room is None else room,
        }


def pair_of(
    model: str,
    logs: Path,
    *arguments: str,
    backend: str = "flowkv",
    name: str = "flowkv",
    **environment: str,
) -> SglangPair:
    """The two servers, not started yet."""
    bootstraps = Port.reserve(), Port.reserve()
    both = [
        "--disaggregation-transfer-backend", backend,
        "--page-size", str(PAGE),
        # Overlap asks for CUDA's events on a prefill server.
        "--disable-overlap-schedule",
        *arguments,
    ]  # fmt: skip
    environment = {"SGLANG_HOST_IP": "127.0.0.1", **environment}
    retraction = ("--disaggregation-decode-retraction-backup", "cpu_tensor")
    servers = [
        sglang_server(
            model,
            logs,
            f"{name}-{role}",
            [
                "--disaggregation-mode",
                role,
                "--disaggregation-bootstrap-port",
                str(port.number),
                *both,
                *own,
            ],
            environment,
        )
        for role, port, own in (("prefill", bootstraps[0], ()), ("decode", bootstraps[1], retraction))
    ]
    return SglangPair(servers[0], servers[1], *bootstraps)


@contextlib.contextmanager
def serving_sglang_pair(model: str, logs: Path, *arguments: str, **named: Any) -> Iterator[SglangPair]:
    """A running ``SglangPair``."""
    pair = pair_of(model, logs, *arguments, **named)
    with serving([pair.prefill, pair.decode]):
        yield pair


def router_of(pair: SglangPair, logs: Path) -> Server:
    """SGLang's own router in front of a pair, not started yet."""
    port = Port.reserve()
    command = [
        sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation",
        "--host", "127.0.0.1", "--port", str(port.number),
        "--prometheus-port", str(Port.reserve().number),
        "--prefill", pair.prefill.url, str(pair.bootstrap.number),
        "--decode", pair.decode.url,
    ]  # fmt: skip
    return Server(name="sglang-router", command=command, port=port, log=logs / "sglang-router.log")


def prompt(seed: int, length: int) -> list[int]:
    """A prompt of ordinary token ids that does not repeat itself."""
    draw = random.Random(seed)
    return [draw.randrange(10, 600) for _ in range(length)]


def load(server: Server) -> dict[str, Any]:
    """What the server says of its queues and its pool."""
    found: dict[str, Any] = ask(server, "/v1/loads?include=all")["loads"][0]
    return found


def all_back(*servers: Server) -> None:
    """Wait until nothing runs or waits, and no page is in use but for the prefix cache."""
    for server in servers:
        eventually(
            f"{server.name} has all pages back",
            lambda server=server: (
                not any(
                    load(server)[key] for key in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
                )
            ),
        )


def queued(server: Server, queue: str) -> int:
    """Requests in one of SGLang's queues of a P/D server, such as ``decode_transfer``."""
    return int(load(server)["disaggregation"][f"{queue}_queue_reqs"])


def kill(server: Server) -> None:
    """As the kernel ends a process that has taken all memory."""
    signal_group(server.pid, signal.SIGKILL)
    eventually(f"{server.name} is gone", lambda: not server.running)
