"""A stock SGLang server of the tiny model, and requests to it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penstock.benchmarks.processes import Port, Server
from penstock.benchmarks.servers import console_script
from penstock.plugins import dashboards

Serve = Callable[..., contextlib.AbstractContextManager[Server]]
"""``serve(*arguments, name=..., **environment)`` is a running server."""
CHUNK = 256
"""Tokens of a prompt that one step computes at most."""
POOL_TOKENS = 20_000
"""Tokens that a server's KV cache holds."""


def sglang_server(
    model: str, logs: Path, name: str, arguments: Sequence[str], environment: dict[str, str]
) -> Server:
    """A server that is not started yet."""
    port = Port.reserve()
    return Server(
        name=name,
        command=command(model, port.number, *arguments),
        port=port,
        log=logs / f"{name}.log",
        environment={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        # It takes the end of its scheduler for a crash, and waits for diagnostics.
        grace_s=2.0,
    )


def command(model: str, port: int, *arguments: str) -> list[str]:
    """``sglang serve`` in float32. Its pool is small: SGLang would take most of the machine's memory."""
    sizes = [
        "--dtype",
        "float32",
        "--max-total-tokens",
        str(POOL_TOKENS),
        "--chunked-prefill-size",
        str(CHUNK),
    ]
    place = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    # Schedulers that spin take the processor from the one that works.
    calm = ["--sleep-on-idle", "--skip-server-warmup"]
    return [console_script("sglang"), "serve", "--model-path", model, *place, *sizes, *calm, *arguments]


class Refused(Exception):
    """The server answered with an error; ``status`` and ``body`` are what it said."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body


def ask(server: Server, path: str, body: dict[str, Any] | None = None, **headers: str) -> Any:
    """What the server answers to a POST of ``body``, or to a GET where there is none. Raises Refused."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(server.url + path, data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise Refused(error.code, error.read().decode(errors="replace")) from None
    return json.loads(text) if text.startswith((b"{", b"[")) else text.decode()


def generate(
    server: Server, prompt: Sequence[int], tokens: int, rid: str | None = None, **sampling: Any
) -> dict[str, Any]:
    """One greedy ``/generate`` of token ids; the whole answer. Raises Refused."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **sampling}
    named = {} if rid is None else {"rid": rid}
    answer: dict[str, Any] = ask(
        server, "/generate", {"input_ids": list(prompt), "sampling_params": sampling, **named}
    )
    return answer


def series(server: Server, name: str) -> dict[str, float]:
    """The values of a series on ``/metrics``, by its labels as they are written there."""
    found = {}
    for line in ask(server, "/metrics").splitlines():
        sample, _, value = line.rpartition(" ")
        if sample.partition("{")[0] == name:
            found[sample.partition("{")[2].rstrip("}")] = float(value)
    return found


def queried(dashboard: str) -> set[str]:
    """The series that a Grafana dashboard of ours queries."""
    text = Path(dashboards.__path__[0], f"{dashboard}.json").read_text(encoding="utf-8")
    return set(re.findall(r"\bpenstock_\w+", text))


def all_at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of ``calls`` made at the same time, in their order."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
