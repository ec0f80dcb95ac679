"""``--request-scheduler`` on a real server: who asks arrives, tokens stay the same, clients are counted.

The server has little room, so that requests wait, and two LoRA adapters.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_adapter import write_adapter

from penstock.benchmarks.asks import ask_together, churn_asks
from penstock.benchmarks.processes import Server
from penstock.benchmarks.servers import Engine, engine_server, serving

GATES = ["open", "half open", "shut"]
ADAPTERS = ("miller", "keeper")
CLIENT = "x-llm-d-inference-fairness-id"
TTFT = "x-llm-d-slo-ttft-ms"
SECTION = {"trust_headers": True, "quantum_tokens": 500, "clients": {"secret": {"client": "keyed"}}}


@pytest.fixture(scope="module")
def scheduled_server(
    engine: Engine, logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [f"{name}={write_adapter(folder / name, seed)}" for seed, name in enumerate(ADAPTERS)]
    arguments = ("--request-scheduler", "dlpm", "--max-num-seqs", "2")
    section = ("--additional-config", json.dumps({"penstock": {"scheduler": SECTION}}))
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", *adapters)
    variant = msgspec.structs.replace(engine, name="dlpm", arguments=(*arguments, *section, *lora))
    server = engine_server(variant, logs)
    with serving([server]):
        yield server


def complete(server: Server, model: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
    content = json.dumps({"model": model, "max_tokens": 8, "temperature": 0, "prompt": "The gate", **body})
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        content.encode(),
        {"content-type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def series(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found = (line.rpartition(" ") for line in lines if line.startswith("penstock_"))
    return {name: float(value) for name, _, value in found}


def of_client(server: Server, name: str, client: str) -> float:
    return series(server).get(f'{name}{{client="{client}",engine="0"}}', 0.0)


def test_tokens_are_the_plain_server_s(scheduled_server, plain_server, model):
    asks = churn_asks(16, seed=9)
    answers = ask_together(scheduled_server.url, model, asks, at_once=8)
    expected = ask_together(plain_server.url, model, asks, at_once=8)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


def test_clients_are_counted_whichever_way_they_are_named(scheduled_server, model):
    def ask(number: int) -> int:
        body = {"prompt": f"{number} keepers of the weir " * 8}
        headers = {CLIENT: "by-header"} if number % 2 else {"authorization": "Bearer secret"}
        status, _ = complete(scheduled_server, model, body, headers)
        return status

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == [200] * 16
    for client in ("by-header", "keyed"):
        assert of_client(scheduled_server, "penstock_client_output_tokens", client) == 8 * 8
        assert of_client(scheduled_server, "penstock_client_extend_tokens", client) > 0
    found = series(scheduled_server)
    assert 0 < found['penstock_client_jain_index{engine="0"}'] <= 1
    assert any(name.startswith("penstock_feature_info") and "request-scheduler" in name for name in found)


def test_nobody_names_itself_where_keys_do(scheduled_server, model):
    status, _ = complete(scheduled_server, model, {"vllm_xargs": {"client_id": "keyed-not"}}, {})
    assert status == 200
    assert of_client(scheduled_server, "penstock_client_output_tokens", "keyed-not") == 0


@pytest.mark.parametrize(
    ("body", "headers", "field"),
    [
        ({"vllm_xargs": {"ttft_slo_ms": -5}}, {}, "ttft_slo_ms"),
        ({"vllm_xargs": {"tpot_slo_ms": "fast"}}, {}, "tpot_slo_ms"),
        ({}, {TTFT: "soon"}, TTFT),
    ],
)
def test_a_bad_target_is_refused_by_name(scheduled_server, model, body, headers, field):
    status, answer = complete(scheduled_server, model, body, headers)
    assert status == 400
    assert answer["error"]["param"] == field


def test_streams_pass(scheduled_server, model):
    content = {"model": model, "max_tokens": 4, "prompt": "The gate", "stream": True}
    request = urllib.request.Request(
        f"{scheduled_server.url}/v1/completions",
        json.dumps(content).encode(),
        {"content-type": "application/json", CLIENT: "streams"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert of_client(scheduled_server, "penstock_client_output_tokens", "streams") == 4


def test_answers_keep_to_their_schema_while_others_wait(scheduled_server, model):
    """A request whose grammar is being compiled is passed over, and must come back."""
    # Without room for white space, which the model would go on with for ever.
    form = {"type": "json_schema", "json_schema": {"name": "gate", "schema": {"enum": GATES}}}

    def ask(number: int) -> Any:
        plain = {"prompt": f"{number} gates", "max_tokens": 40}
        body = plain if number % 2 else {**plain, "response_format": form}
        status, answer = complete(scheduled_server, model, body, {CLIENT: f"form{number % 2}"})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(12)))
    assert {json.loads(text) for text in texts[::2]} <= {*GATES}


def test_requests_of_two_adapters_wait_for_the_one_slot_in_turns(scheduled_server, model):
    """Those of the adapter that is not in the slot are passed over. (Requests of an adapter and of the bare
    model in one batch change each other's answers on the CPU, with stock's scheduler as well.)"""

    def ask(number: int) -> str:
        body = {"model": ADAPTERS[number % 2], "prompt": "The gate of the mill", "max_tokens": 12}
        status, answer = complete(scheduled_server, model, body, {CLIENT: ADAPTERS[number % 2]})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    alone = [ask(0), ask(1)]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone * 4
    for name in ADAPTERS:
        assert of_client(scheduled_server, "penstock_client_output_tokens", name) == 5 * 12


def test_the_engine_core_says_what_is_active(scheduled_server):
    lines = scheduled_server.log.read_text().splitlines()
    assert any("EngineCore" in line and "request-scheduler is active" in line for line in lines)
