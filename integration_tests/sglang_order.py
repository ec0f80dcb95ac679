"""The order in which an SGLang server takes the requests of its clients."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from engine_pair import eventually
from sglang_server import CHUNK, ask, generate

from penstock.benchmarks.processes import Server

PROMPT = 60


def prompt(seed: int, length: int = PROMPT) -> list[int]:
    """Prompts of different seeds differ from the first token on."""
    return [10 + seed, *(10 + (seed * 131 + i * 7) % 500 for i in range(length - 1))]


def change(server: Server, **values: float) -> bool:
    """Whether the server took a change at run time."""
    (updated,) = ask(server, "/set_internal_state", {"server_args": values})
    return bool(updated)


def waiting(server: Server) -> int:
    """How many requests wait."""
    return sum(load["num_waiting_reqs"] for load in ask(server, "/v1/loads")["loads"])


def order_of_service(server: Server, clients: Sequence[str], held_tokens: int = 15_000) -> list[int]:
    """Requests of ``clients`` arrive one after the other behind one that runs and would for ``held_tokens``,
    where one runs at a time; in which order they end."""

    def ended(index: int, client: str) -> float:
        named = {"custom_params": {"client_id": client}} if client else {}
        answer = generate(server, prompt(index), 1, **named)
        return float(answer["meta_info"]["request_finished_ts"])

    with ThreadPoolExecutor(len(clients) + 1) as pool:
        holder = pool.submit(partial(generate, server, prompt(400, CHUNK), held_tokens, rid="holder"))
        eventually(
            "the first one runs", lambda: ask(server, "/v1/loads")["loads"][0]["num_running_reqs"] == 1
        )
        futures = []
        for index, client in enumerate(clients):
            futures.append(pool.submit(partial(ended, index, client)))
            eventually("it waits", lambda: waiting(server) == len(futures))
        ask(server, "/abort_request", {"rid": "holder"})
        holder.result()
        at = [future.result() for future in futures]
    ask(server, "/flush_cache", {})
    return sorted(range(len(clients)), key=at.__getitem__)
