"""``--schedule-policy dlpm`` on a real server: who is served when, who asks, what is shown and changed, and
that answers stay stock's.

Where order matters one request runs at a time, and a first one holds the place while the others gather: the
order in which they end is the order in which they were taken.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial

import pytest
from engine_pair import eventually
from sglang_order import PROMPT, change, order_of_service, prompt
from sglang_server import CHUNK, Refused, Serve, all_at_once, ask, command, generate, queried, series

from penstock.benchmarks.processes import Server
from penstock.plugins.ledger import METRIC

QUANTUM = 100
NOBODY = ""
RUNNING = 64
QUANTUM_KEY = "penstock.quantum_tokens"


@pytest.fixture(scope="module")
def server(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    ours = json.dumps({"scheduler": {"quantum_tokens": QUANTUM, "trust_headers": True, "shown_clients": 100}})
    config = tmp_path_factory.mktemp("config") / "server.yaml"
    config.write_text(
        f"schedule-policy: dlpm\npenstock-config: '{ours}'\nmax-running-requests: {RUNNING}\n"
        "enable-metrics: true\n"
    )
    # SGLang's own knob for tests: every so many passes it retracts, as if memory had run out.
    retracting = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
    with serve("--config", str(config), name="sglang-dlpm", **retracting) as server:
        yield server


@pytest.fixture
def one_at_a_time(server: Server) -> Iterator[None]:
    assert change(server, pp_max_micro_batch_size=1)
    yield
    assert change(server, pp_max_micro_batch_size=RUNNING)


def of_client(server: Server, name: str, client: str) -> float | None:
    """A client's value of a series; None if it is not shown."""
    found = [value for labels, value in series(server, name).items() if f'client="{client}"' in labels]
    return found[0] if found else None


@pytest.mark.usefixtures("one_at_a_time")
def test_a_client_that_floods_waits_behind_one_that_does_not(server: Server):
    # A quantum pays for two prompts of the flood; both of the other's are served before its third.
    assert order_of_service(server, [*["flood"] * 6, *["light"] * 2]) == [0, 1, 6, 7, 2, 3, 4, 5]


@pytest.mark.usefixtures("one_at_a_time")
def test_a_quantum_that_was_changed_while_the_server_runs_counts_from_then_on(server: Server):
    assert change(server, **{QUANTUM_KEY: 10**6, "pp_max_micro_batch_size": 1})
    try:
        assert order_of_service(server, [*["another flood"] * 4, *["another light"] * 2]) == list(range(6))
    finally:
        assert change(server, **{QUANTUM_KEY: QUANTUM})


@pytest.mark.parametrize(
    "values",
    [
        {QUANTUM_KEY: 0},
        {QUANTUM_KEY: -5},
        {"penstock.weights.gold": 1000},
        {"penstock.weights.": 2},
        {"penstock.policy": 1},
        {QUANTUM_KEY: 7, "no_such_setting": 1},
        {QUANTUM_KEY: 7, "pp_max_micro_batch_size": -1},
    ],
)
def test_a_change_that_cannot_be_is_refused_and_changes_nothing(server: Server, values):
    assert not change(server, **values)


def test_a_change_to_something_that_is_no_number_is_refused(server: Server):
    with pytest.raises(Refused) as refused:
        change(server, **{QUANTUM_KEY: "much"})
    assert 400 <= refused.value.status < 500


@pytest.mark.usefixtures("one_at_a_time")
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


@pytest.mark.parametrize("given", [5, [1], "text"])
def test_custom_params_of_another_type_are_refused_and_the_server_goes_on(server: Server, given):
    sampling = {"max_new_tokens": 1, "custom_params": given}
    for path, body in (
        ("/generate", {"input_ids": prompt(1), "sampling_params": sampling}),
        (
            "/v1/completions",
            {"model": "default", "prompt": prompt(1), "max_tokens": 1, "custom_params": given},
        ),
    ):
        with pytest.raises(Refused) as refused:
            ask(server, path, body)
        assert 400 <= refused.value.status < 500
    assert generate(server, prompt(1), 1)["output_ids"]


def test_what_a_client_had_is_shown_under_our_names_and_under_sglang_s(server: Server):
    body = {"model": "default", "prompt": prompt(2), "max_tokens": 3, "custom_params": {"client_id": "seen"}}
    assert ask(server, "/v1/completions", body)["choices"]
    eventually("it is shown", lambda: of_client(server, "penstock_client_output_tokens", "seen"))
    for prefix in ("", "sglang:"):
        assert of_client(server, f"{prefix}penstock_client_output_tokens", "seen") == 3
        extend = of_client(server, f"{prefix}penstock_client_extend_tokens", "seen")
        assert 0 < extend <= PROMPT
        assert of_client(server, f"{prefix}penstock_client_service_tokens", "seen") == extend + 2 * 3
        assert of_client(server, f"{prefix}penstock_client_waiting_requests", "seen") == 0
    assert {name for name in queried("request-scheduling") if not series(server, name)} == set()
    (labels,) = series(server, "sglang:penstock_client_jain_index")
    assert "model_name=" in labels


def test_a_trusted_header_or_a_routing_key_says_who_asks(server: Server):
    fairness = {"x-llm-d-inference-fairness-id": "by-header"}
    body = {"model": "default", "prompt": prompt(3), "max_tokens": 2, "custom_params": {"client_id": "own"}}
    assert ask(server, "/v1/completions", body, **fairness)["choices"]
    sampling = {"max_new_tokens": 2, "ignore_eos": True}
    routed = {"input_ids": prompt(4), "sampling_params": sampling, "routing_key": "by-key"}
    assert ask(server, "/generate", routed)["output_ids"]
    messages = {"model": "default", "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
    assert ask(server, "/v1/messages", messages, **{"X-SMG-Routing-Key": "by-message"})["content"]
    for client in ("by-header", "by-key", "by-message"):
        eventually(
            f"{client} is shown",
            lambda client=client: of_client(server, "penstock_client_output_tokens", client) == 2,
        )
    assert of_client(server, "penstock_client_output_tokens", "own") is None


def test_a_header_that_says_nonsense_is_refused_by_name(server: Server):
    body = {"input_ids": prompt(1), "sampling_params": {"max_new_tokens": 1}}
    with pytest.raises(Refused) as refused:
        ask(server, "/generate", body, **{"x-llm-d-slo-ttft-ms": "soon"})
    assert refused.value.status == 400
    assert "x-llm-d-slo-ttft-ms: given 'soon'" in refused.value.body


def test_two_hundred_at_once_with_shared_prefixes_leave_nothing_behind(server: Server, greedy):
    tokens, crowd = 60, 200
    shared = [prompt(50 + group, 100) for group in range(4)]
    prompts = [[*shared[number % 4], 20 + number, 300 - number] for number in range(crowd)]
    calls = [
        partial(generate, server, row, tokens, custom_params={"client_id": f"crowd {number % 4}"})
        for number, row in enumerate(prompts)
    ]
    answers = [answer["output_ids"] for answer in all_at_once(calls)]
    for number in range(0, crowd, 50):
        assert answers[number] == greedy(prompts[number], tokens)
    assert {len(ids) for ids in answers} == {tokens}
    assert sum(series(server, "sglang:num_retracted_requests_total").values()) > 0
    for group in range(4):
        client = f"crowd {group}"
        eventually(
            f"{client} was charged once for each token",
            lambda client=client: of_client(server, "penstock_client_output_tokens", client) == 50 * tokens,
        )
        assert of_client(server, "penstock_client_waiting_requests", client) == 0
    # SGLang looks for leaks when it is idle, and ends if there are any.
    assert generate(server, prompts[0], 4)["output_ids"] == greedy(prompts[0], 4)

    def load() -> tuple[int, int]:
        (found,) = ask(server, "/v1/loads")["loads"]
        return found["num_running_reqs"], found["num_waiting_reqs"]

    eventually("nobody runs or waits", lambda: load() == (0, 0))


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
