"""A prefill and a decode server of stock SGLang with one transfer backend, and SGLang's own router."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_server import ask, sglang_server

from penstock.benchmarks.processes import Port, Server
from penstock.benchmarks.servers import serving

PAGE = 16


@dataclass(frozen=True, slots=True)
class SglangPair:
    """Two servers; ``port`` is where prefill's bootstrap server listens."""

    prefill: Server
    decode: Server
    bootstrap: Port

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
    prefill: Sequence[str] = (),
    decode: Sequence[str] = (),
    **environment: str,
) -> SglangPair:
    """The two servers, not started yet."""
    bootstrap = Port.reserve()
    both = [
        "--disaggregation-transfer-backend", backend,
        "--disaggregation-bootstrap-port", str(bootstrap.number),
        "--page-size", str(PAGE),
        # Overlap asks for CUDA's events on a prefill server.
        "--disable-overlap-schedule",
        *arguments,
    ]  # fmt: skip
    environment = {"SGLANG_HOST_IP": "127.0.0.1", **environment}
    servers = [
        sglang_server(model, logs, f"{name}-{role}", ["--disaggregation-mode", role, *both, *own], environment)
        for role, own in (
            ("prefill", prefill),
            ("decode", ("--disaggregation-decode-retraction-backup", "cpu_tensor", *decode)),
        )
    ]
    return SglangPair(servers[0], servers[1], bootstrap)


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
