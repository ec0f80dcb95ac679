"""``--disaggregation-transfer-backend flowkv``: two stock SGLang servers answer what one does, behind
SGLang's router and behind Penstock's proxy.

Both may change roles, so decode has a prefix cache of its own. Both order requests by ``dlpm``, which changes
no answer, leaves nothing behind when a client leaves, and goes along when they change roles.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from engine_pair import eventually
from sglang_pair import PAGE, SglangPair, all_back, load, prompt, queued, router_of, serving_sglang_pair
from sglang_server import CHUNK, POOL_TOKENS, Refused, all_at_once, ask, generate, series

from penstock.benchmarks.processes import Server
from penstock.benchmarks.servers import proxy_server, serving

TOKENS = 8
LENGTHS = (1, PAGE, PAGE + 1, 100, CHUNK, 3 * CHUNK + 5)
CLIENTS = 200
GREEDY = {"temperature": 0, "return_token_ids": True}
FLOOD = 120
FAIR = json.dumps({"scheduler": {"quantum_tokens": 200}, "flowkv": {}})
WEARING = 50
"""Prompts that fill the pools' prefix caches and more."""


@pytest.fixture(scope="module")
def pair(model: str, logs: Path) -> Iterator[SglangPair]:
    # Without a prefix cache on decode, SGLang loses pages when a prefill server becomes one.
    switching = ("--enable-pd-role-switch", "--disaggregation-decode-enable-radix-cache")
    fair = ("--schedule-policy", "dlpm", "--penstock-config", FAIR)
    with serving_sglang_pair(model, logs, *switching, *fair, "--enable-metrics") as pair:
        yield pair


@pytest.fixture(scope="module")
def router(pair: SglangPair, logs: Path) -> Iterator[Server]:
    with serving([server := router_of(pair, logs)]):
        # It is healthy before it has looked at the servers behind it.
        eventually("the router knows both servers", lambda: answers(server))
        yield server


@pytest.fixture(scope="module")
def proxy(pair: SglangPair, logs: Path) -> Iterator[Server]:
    with serving([server := proxy_server([pair.prefill], [pair.decode], logs)]):
        yield server


def answers(server: Server) -> bool:
    """Whether a request is not turned away."""
    try:
        generate(server, [10], 1)
    except Refused as refused:
        if refused.status != 503:
            raise
        return False
    return True


def test_answers_behind_sglang_s_router_are_transformers_cold_and_from_the_prefix_caches(
    pair: SglangPair, router: Server, greedy
):
    prompts = [prompt(i, length) for i, length in enumerate(LENGTHS)]
    wanted = [greedy(row, TOKENS) for row in prompts]
    for _wave in range(2):
        answers = all_at_once([partial(generate, router, row, TOKENS) for row in prompts])
        assert [answer["output_ids"] for answer in answers] == wanted
    all_back(pair.prefill, pair.decode)


def completion(prompt: list[int] | list[list[int]], **more: Any) -> dict[str, Any]:
    """The body of a greedy ``/v1/completions`` that names the tokens of its answer."""
    return {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, **GREEDY, **more}


def streamed(server: Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed ``/v1/completions``, as they come."""
    data = json.dumps(body | {"stream": True}).encode()
    asked = urllib.request.Request(
        f"{server.url}/v1/completions", data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


def test_twenty_at_once_behind_penstock_s_proxy_get_transformers_tokens(
    pair: SglangPair, proxy: Server, greedy
):
    prompts = [prompt(100 + i, LENGTHS[i % len(LENGTHS)]) for i in range(20)]

    def whole(row: list[int]) -> list[int]:
        return ask(proxy, "/v1/completions", completion(row))["choices"][0]["token_ids"]

    def stream(row: list[int]) -> list[int]:
        return [
            token for event in streamed(proxy, completion(row)) for token in event["choices"][0]["token_ids"]
        ]

    def native(row: list[int]) -> list[int]:
        return generate(proxy, row, TOKENS)["output_ids"]

    found = all_at_once([partial((whole, stream, native)[i % 3], row) for i, row in enumerate(prompts)])
    assert found == [greedy(row, TOKENS) for row in prompts]
    all_back(pair.prefill, pair.decode)


def test_several_prompts_and_answers_behind_penstock_s_proxy(pair: SglangPair, proxy: Server, greedy):
    prompts = [prompt(130 + i, length) for i, length in enumerate((5, CHUNK + 3))]
    wanted = [greedy(row, TOKENS) for row in prompts]
    for n, expected in ((1, wanted), (2, [wanted[0], wanted[0], wanted[1], wanted[1]])):
        answer = ask(proxy, "/v1/completions", completion(prompts, n=n))
        assert [choice["token_ids"] for choice in answer["choices"]] == expected
        assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    all_back(pair.prefill, pair.decode)


def test_a_prompt_s_log_probabilities_behind_penstock_s_proxy(pair: SglangPair, proxy: Server):
    row = prompt(140, 2 * PAGE)
    body = {"input_ids": row, "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
    answer = ask(proxy, "/generate", body | {"return_logprob": True, "logprob_start_len": 0})
    assert [token for _, token, _ in answer["meta_info"]["input_token_logprobs"]] == row
    assert [token for _, token, _ in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]


def test_a_client_that_leaves_penstock_s_proxy_frees_both_servers(pair: SglangPair, proxy: Server):
    events = streamed(proxy, completion(prompt(150, CHUNK), max_tokens=4000))
    next(events)
    eventually("decode works for it", lambda: load(pair.decode)["num_running_reqs"] == 1)
    events.close()
    all_back(pair.prefill, pair.decode)


@pytest.mark.parametrize("wrong", [{"prompt": [5] * 30_000}, {"temperature": -3}, {"bootstrap_room": 7}])
def test_a_bad_request_behind_penstock_s_proxy_is_refused_and_leaves_nothing(
    pair: SglangPair, proxy: Server, wrong: dict[str, Any]
):
    with pytest.raises(Refused) as refused:
        ask(proxy, "/v1/completions", completion(prompt(160, 5)) | wrong)
    assert refused.value.status == 400
    all_back(pair.prefill, pair.decode)


def test_what_decode_reads_is_on_its_metrics_page(pair: SglangPair, model: str):
    figures = ("xfer_time_seconds_count", "num_descriptors_sum", "bytes_transferred_sum")

    def read() -> list[float]:
        return [sum(series(pair.decode, f"sglang:flowkv_{name}").values()) for name in figures]

    before = read()
    for seed, chunks in ((90, 1), (91, 3)):
        pair.generate(prompt(seed, chunks * CHUNK), 1)
    transfers, descriptors, moved = (now - then for now, then in zip(read(), before, strict=True))
    # A chunk is a transfer. Pages are handed out in runs, and a run is a descriptor.
    assert transfers == 4
    assert moved == 4 * CHUNK * token_bytes(model)
    assert 4 <= descriptors <= 4 * CHUNK / PAGE / 2
    (labels,) = series(pair.decode, "sglang:flowkv_num_descriptors_count")
    assert {'tp_rank="0"', 'engine_type="dynamic"'} < set(labels.split(","))
    assert series(pair.prefill, "sglang:flowkv_num_descriptors_count") == {}


def test_worn_pools_still_make_few_descriptors_and_right_answers(pair: SglangPair, greedy):
    """More prompts than the prefix caches hold, of all lengths, some of which begin alike."""
    shared = prompt(100, 5 * PAGE)
    lengths = [40 + 97 * i % 900 for i in range(WEARING)]
    all_at_once(
        [
            partial(pair.generate, [*shared[: i % 2 * len(shared)], *prompt(200 + i, length)], 2)
            for i, length in enumerate(lengths)
        ]
    )
    assert sum(lengths) > POOL_TOKENS
    before = posted(pair)
    chunks = 4
    for seed in (110, 111, 112):
        row = prompt(seed, chunks * CHUNK)
        assert pair.generate(row, TOKENS)["output_ids"] == greedy(row, TOKENS)
    transfers, descriptors = (now - then for now, then in zip(posted(pair), before, strict=True))
    assert transfers == 3 * chunks
    # A page each would be sixteen times as many.
    assert descriptors <= 4 * transfers, f"{descriptors} descriptors in {transfers} transfers"
    all_back(pair.prefill, pair.decode)


def posted(pair: SglangPair) -> tuple[float, float]:
    """Transfers of decode so far, and the descriptors that they took."""
    count, total = (
        sum(series(pair.decode, f"sglang:flowkv_num_descriptors_{what}").values())
        for what in ("count", "sum")
    )
    return count, total


def token_bytes(model: str) -> int:
    """Of one token's K and V in float32, all layers."""
    config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    heads = config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 4 * int(config["num_hidden_layers"] * heads * size)


def test_two_hundred_at_once_that_begin_alike(pair: SglangPair, router: Server, greedy):
    shared = prompt(50, 3 * PAGE)
    prompts = [[*shared, *prompt(60 + i % 20, 1 + i % 20)] for i in range(CLIENTS)]
    wanted = {tuple(row): greedy(row, 2) for row in prompts}
    answers = all_at_once([partial(generate, router, row, 2) for row in prompts])
    assert [answer["output_ids"] for answer in answers] == [wanted[tuple(row)] for row in prompts]
    all_back(pair.prefill, pair.decode)


def test_a_client_that_floods_decode_s_memory_does_not_keep_another_one_waiting(pair: SglangPair):
    """Decode keeps 512 tokens free for each request that it gave memory: it has room for some of them."""

    # Decode knows its prefill server before that falls asleep.
    pair.generate(prompt(999, PAGE), 1)

    def asked(index: int, client: str) -> float:
        body = pair.body(prompt(1000 + index, 2 * PAGE), TOKENS)
        body["sampling_params"]["custom_params"] = {"client_id": client}
        first = pool.submit(ask, pair.prefill, "/generate", body)
        ended = ask(pair.decode, "/generate", body)["meta_info"]["request_finished_ts"]
        first.result()
        return float(ended)

    with ThreadPoolExecutor(2 * FLOOD + 4) as pool:
        pair.prefill.pause()
        try:
            flood = [pool.submit(asked, index, "flood") for index in range(FLOOD)]
            eventually("all of the flood wait", lambda: waiting(pair.decode) == FLOOD)
            admitted = queued(pair.decode, "decode_transfer")
            light = pool.submit(asked, FLOOD, "light")
            eventually("so does the other one", lambda: waiting(pair.decode) == FLOOD + 1)
        finally:
            pair.prefill.resume()
        ended = [future.result() for future in flood]
        # Before it end those that had memory when it came, and perhaps those that had some together with it.
        assert 0 < admitted < FLOOD / 3
        assert sum(at < light.result() for at in ended) <= 2 * admitted
    all_back(pair.prefill, pair.decode)
    # A prompt is computed on one server and kept on the other; an answer is generated on one.
    prompts, answers = FLOOD * 2 * PAGE, FLOOD * TOKENS
    for server, service in ((pair.prefill, (prompts, 0)), (pair.decode, (prompts, answers))):
        eventually(f"{server.name} shows it", lambda server=server, service=service: had(server) == service)


def had(server: Server) -> tuple[float, ...]:
    """Prompt tokens and generated tokens of the flood."""
    found = [series(server, f"penstock_client_{kind}_tokens") for kind in ("extend", "output")]
    return tuple(sum(value for labels, value in one.items() if 'client="flood"' in labels) for one in found)


def waiting(server: Server) -> int:
    """Requests that wait for memory or for their prompts."""
    return queued(server, "decode_prealloc") + queued(server, "decode_transfer")


@pytest.mark.parametrize("asleep", ["prefill", "decode"])
def test_a_client_that_leaves_takes_its_pages_along(pair: SglangPair, greedy, asleep: str):
    row = prompt(70, 2 * CHUNK)
    sleeper, awake = (pair.prefill, pair.decode)[:: 1 if asleep == "prefill" else -1]
    sleeper.pause()
    try:
        leave(pair, row, awake)
    finally:
        sleeper.resume()
    all_back(pair.prefill, pair.decode)
    assert pair.generate(row, TOKENS)["output_ids"] == greedy(row, TOKENS)


def leave(pair: SglangPair, row: list[int], awake: Server) -> None:
    """Ask both servers, and hang up when the one that is awake has the request."""
    body = json.dumps(pair.body(row, TOKENS))
    lines = [HTTPConnection("127.0.0.1", server.port.number) for server in (pair.prefill, pair.decode)]
    for line in lines:
        line.request("POST", "/generate", body, {"Content-Type": "application/json"})
    eventually(f"{awake.name} has the request", lambda: load(awake)["num_waiting_reqs"] > 0)
    for line in lines:
        line.close()


def test_weights_change_under_answers_and_nothing_of_the_old_ones_is_served(
    pair: SglangPair, proxy: Server, model: str, greedy, other_weights
):
    """Answers under way go on from where they are; their prompts, and what was cached, are computed anew."""
    folder, other = other_weights
    long, cached = 200, [prompt(170 + i, length) for i, length in enumerate((PAGE, CHUNK + 5))]
    for row in cached:
        assert generate(proxy, row, TOKENS)["output_ids"] == greedy(row, TOKENS)
    rows = [prompt(180 + i, length) for i, length in enumerate((PAGE, 40, CHUNK + 30))]
    with ThreadPoolExecutor(len(rows)) as pool:
        answers = [pool.submit(generate, proxy, row, long) for row in rows]
        eventually("all are decoded", lambda: load(pair.decode)["num_running_reqs"] == len(rows))
        for server in (pair.decode, pair.prefill):
            ask(server, "/pause_generation", {"mode": "retract"})
        for server in (pair.prefill, pair.decode):
            assert ask(server, "/update_weights_from_disk", {"model_path": folder})["success"]
        for server in (pair.prefill, pair.decode):
            ask(server, "/continue_generation", {})
        for row, answer in zip(rows, answers, strict=True):
            said, before = answer.result()["output_ids"], greedy(row, long)
            kept = next(i for i, (now, then) in enumerate(zip(said, before, strict=True)) if now != then)
            assert kept > 0
            assert said[kept:] == other([*row, *said[:kept]], long - kept)
    for row in cached:
        assert generate(proxy, row, TOKENS)["output_ids"] == other(row, TOKENS)
    all_back(pair.prefill, pair.decode)
    for server in (pair.prefill, pair.decode):
        assert ask(server, "/update_weights_from_disk", {"model_path": model})["success"]
    for row in cached:
        assert generate(proxy, row, TOKENS)["output_ids"] == greedy(row, TOKENS)


def test_both_servers_change_roles_and_back(pair: SglangPair, proxy: Server, greedy):
    """Penstock's proxy is asked before it can know."""
    all_back(pair.prefill, pair.decode)
    row = prompt(80, CHUNK + 9)
    for now in (pair.swapped(), pair):
        for server, role in ((now.prefill, "prefill"), (now.decode, "decode")):
            answer = ask(server, "/pd_role_switch", {"new_role": role, "decode_cuda_graph_memory_gb": 0})
            assert answer["success"], answer
        assert generate(proxy, row, TOKENS)["output_ids"] == greedy(row, TOKENS)
        for _time in range(2):
            assert now.generate(row, TOKENS)["output_ids"] == greedy(row, TOKENS)
        all_back(now.prefill, now.decode)
