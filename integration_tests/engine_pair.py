"""A prefill and a decode server under test, driven step by step as a router would drive them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from penstock.benchmarks.processes import Server
from penstock.benchmarks.scrape import samples

ASK_FOR_REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}
USAGE = "vllm:kv_cache_usage_perc"


def eventually(what: str, holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Poll until ``holds``; fail with ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def tokens(seed: int, length: int) -> list[int]:
    """A prompt of ordinary token ids; different seeds share no first block."""
    return [10 + (seed * 131 + i * (7 + seed % 5)) % 300 for i in range(length)]


@dataclass(slots=True)
class Pair:
    """Two servers of one model; the prefill server also answers whole requests, as the reference."""

    model: str
    prefill: Server
    decode: Server

    def body(self, prompt: Sequence[int] | Sequence[Sequence[int]], **more: Any) -> dict[str, Any]:
        """A greedy completion request that returns token ids."""
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": 12,
            "temperature": 0,
            "return_token_ids": True,
            **more,
        }

    def reference(self, prompt: Sequence[int]) -> list[int]:
        """What one undivided engine answers."""
        return token_ids(ask(self.prefill, self.body(prompt)))

    def prefill_params(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Prefill ``prompt``; returns what the prefill server hands off."""
        answer = ask(self.prefill, self.body(prompt, max_tokens=1, kv_transfer_params=ASK_FOR_REMOTE_DECODE))
        answer.raise_for_status()
        params: dict[str, Any] = answer.json()["kv_transfer_params"]
        return params

    def decode_with(self, prompt: Sequence[int], params: Any, **more: Any) -> httpx.Response:
        """Decode ``prompt`` with whatever hand-off is given."""
        return ask(self.decode, self.body(prompt, kv_transfer_params=params, **more))

    def await_idle(self, server: Server, timeout_s: float = 30.0) -> None:
        """Wait until no KV block of ``server`` is in use."""
        eventually(f"{server.name} has all blocks back", lambda: samples(server.url)[USAGE] == 0, timeout_s)


def ask(server: Server, body: dict[str, Any], timeout_s: float = 120.0) -> httpx.Response:
    """POST one completion request."""
    # Nothing here is encrypted; to read the certificates anyway costs 30 ms of processor a call.
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=timeout_s, verify=False)


def token_ids(answer: httpx.Response) -> list[int]:
    """Token ids of the first choice of a good answer."""
    answer.raise_for_status()
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def failed_cleanly(answer: httpx.Response) -> bool:
    """An error status, or the engine's own word that the request failed."""
    return answer.status_code >= 400 or answer.json()["choices"][0]["finish_reason"] == "error"
