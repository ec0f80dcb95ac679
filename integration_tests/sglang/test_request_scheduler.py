"""``--schedule-policy dlpm`` on a real server: who is served when, and that answers stay stock's.

One request runs at a time, and a first one holds the place while the others gather: the order in which they
end is the order in which they were taken.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from engine_pair import eventually
from sglang_server import CHUNK, Refused, Serve, all_at_once, ask, command, generate

from penstock.benchmarks.processes import Server
from penstock.plugins.ledger import METRIC

QUANTUM = 100
PROMPT = 60
NOBODY = ""


@pytest.fixture(scope="module")
def server(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    ours = json.dumps({"scheduler": {"quantum_tokens": QUANTUM}})
    config = tmp_path_factory.mktemp("config") / "server.yaml"
    config.write_text(
        f"schedule-policy: dlpm\npenstock-config: '{ours}'\nmax-running-requests: 1\nenable-metrics: true\n"
    )
    with serve("--config", str(config), name="sglang-dlpm") as server:
        yield server


def prompt(seed: int, length: int = PROMPT) -> list[int]:
    """Prompts of different seeds differ from the first token on."""
    return [10 + seed, *(10 + (seed * 131 + i * 7) % 500 for i in range(length - 1))]


def waiting(server: Server) -> int:
    return sum(load["num_waiting_reqs"] for load in ask(server, "/v1/loads")["loads"])


def order_of_service(server: Server, clients: Sequence[str]) -> list[int]:
    """Requests of ``clients`` arrive one after the other behind one that runs; in which order they end."""

    def ended(index: int, client: str) -> float:
        named = {"custom_params": {"client_id": client}} if client else {}
        answer = generate(server, prompt(index), 1, **named)
        return answer["meta_info"]["request_finished_ts"]

    with ThreadPoolExecutor(len(clients) + 1) as pool:
        holder = pool.submit(partial(generate, server, prompt(400, CHUNK), 15000, rid="holder"))
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


def test_a_client_that_floods_waits_behind_one_that_does_not(server: Server):
    # A quantum pays for two prompts of the flood; both of the other's are served before its third.
    assert order_of_service(server, [*["flood"] * 6, *["light"] * 2]) == [0, 1, 6, 7, 2, 3, 4, 5]


def test_without_clients_the_order_is_stock_s(server: Server):
    assert order_of_service(server, [NOBODY] * 6) == list(range(6))


def test_answers_are_transformers_whoever_asks_and_however_long_the_prompt(server: Server, greedy):
    lengths = [3, PROMPT, CHUNK + 1, 3 * CHUNK + 5, PROMPT]
    prompts = [prompt(index, length) for index, length in enumerate(lengths)]
    clients = ["one", "two", "one", "two", "three"]
    calls = [
        partial(generate, server, row, 8, custom_params={"client_id": client})
        for row, client in zip(prompts, clients, strict=True)
    ]
    assert [answer["output_ids"] for answer in all_at_once(calls)] == [greedy(row, 8) for row in prompts]


@pytest.mark.parametrize("said", [{"client_id": 5}, {"client_id": ["a"]}, {"weight": "much"}, {"weight": -1}])
def test_a_request_that_says_nonsense_of_itself_is_refused_and_the_server_goes_on(server: Server, said):
    (field,) = said
    for path, body in (
        (
            "/generate",
            {"input_ids": prompt(1), "sampling_params": {"max_new_tokens": 1, "custom_params": said}},
        ),
        (
            "/v1/completions",
            {"model": "default", "prompt": prompt(1), "max_tokens": 1, "custom_params": said},
        ),
    ):
        with pytest.raises(Refused) as refused:
            ask(server, path, body)
        assert refused.value.status == 400
        assert f"{field}: given" in refused.value.body
    assert generate(server, prompt(1), 1)["output_ids"]


def test_clients_count_on_the_openai_endpoint_as_well(server: Server):
    body = {"model": "default", "prompt": prompt(2), "max_tokens": 1, "custom_params": {"client_id": "a"}}
    assert ask(server, "/v1/completions", body)["choices"]


def test_the_server_says_which_policy_it_has_and_what_is_active(server: Server):
    assert ask(server, "/server_info")["schedule_policy"] == "dlpm"
    rows = [line for line in ask(server, "/metrics").splitlines() if line.startswith(METRIC)]
    assert any('feature="request-scheduler"' in row and 'state="active"' in row for row in rows)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--schedule-policy", "vtc", "--enable-priority-scheduling"], "--enable-priority-scheduling"),
        (["--penstock-config", '{"scheduler": {"quantum": 5}}'], "scheduler.quantum"),
    ],
)
def test_what_cannot_be_ends_the_start_with_one_line(model: str, arguments: list[str], named: str):
    done = subprocess.run(
        command(model, 1, *arguments),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("penstock: error:")]
    assert len(lines) == 1
    assert named in lines[0]
    assert "Traceback" not in done.stderr
