"""A stock SGLang server of the tiny model, and requests to it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penstock.benchmarks.processes import Port, Server
from penstock.benchmarks.servers import console_script

Serve = Callable[..., contextlib.AbstractContextManager[Server]]
"""``serve(*arguments, name=..., **environment)`` is a running server."""
CHUNK = 256
"""Tokens of a prompt that one step computes at most."""


def sglang_server(
    model: str, logs: Path, name: str, arguments: Sequence[str], environment: dict[str, str]
) -> Server:
    """A server that is not started yet. Its pool is small: SGLang would take most of the machine's memory."""
    port = Port.reserve()
    command = [console_script("sglang"), "serve", "--model-path", model, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port.number), "--dtype", "float32"]
    command += ["--max-total-tokens", "20000", "--chunked-prefill-size", str(CHUNK)]
    # Schedulers that spin take the processor from the one that works.
    command += ["--sleep-on-idle", "--skip-server-warmup", *arguments]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return Server(name=name, command=command, port=port, log=logs / f"{name}.log", environment=environment)


class Refused(Exception):
    """The server answered with an error; ``status`` and ``body`` are what it said."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body


def generate(server: Server, prompt: Sequence[int], tokens: int, **sampling: Any) -> dict[str, Any]:
    """One greedy ``/generate`` of token ids; the whole answer. Raises Refused."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, **sampling}
    body = json.dumps({"input_ids": list(prompt), "sampling_params": sampling}).encode()
    request = urllib.request.Request(
        server.url + "/generate", body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise Refused(error.code, error.read().decode(errors="replace")) from None


def all_at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of ``calls`` made at the same time, in their order."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
