"""What clients see through the proxy, with real engines behind it, against one plain server."""

from __future__ import annotations

import time
from collections.abc import Callable

import openai
import pytest

from penstock.benchmarks.asks import ask_together, churn_asks
from penstock.benchmarks.processes import Server
from penstock.benchmarks.scrape import samples, transfers
from penstock.benchmarks.servers import Pair

DEADLINE_S = 60.0
PROMPTS = [f"{number}. The keeper of the weir has a table on the wall. " * 8 for number in range(3)]


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=180)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def at_rest(server: Server) -> bool:
    """No request runs or waits, and no block is held."""
    found = samples(server.url)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(found[f"vllm:{name}"] == 0 for name in names)


def both_at_rest(pair: Pair) -> bool:
    return at_rest(pair.prefill) and at_rest(pair.decode)


def test_many_clients_at_once_get_the_plain_server_s_tokens(flowkv_pair, plain_server, model):
    asks = churn_asks(32, seed=5)
    before = transfers(flowkv_pair.decode.url, "flowkv").count
    answers = ask_together(flowkv_pair.url, model, asks, at_once=8)
    expected = ask_together(plain_server.url, model, asks, at_once=8)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert all(len(answer.token_ids) == ask.max_tokens for ask, answer in zip(asks, answers, strict=True))
    wait_until(lambda: transfers(flowkv_pair.decode.url, "flowkv").count == before + len(asks))
    wait_until(lambda: both_at_rest(flowkv_pair))


def test_several_prompts_in_one_request(flowkv_pair, plain_server, model):
    def texts(url: str) -> list[str]:
        with client(url) as api:
            reply = api.completions.create(model=model, prompt=PROMPTS, max_tokens=12, temperature=0)
        return [choice.text for choice in sorted(reply.choices, key=lambda choice: choice.index)]

    assert texts(flowkv_pair.url) == texts(plain_server.url)
    assert len(texts(flowkv_pair.url)) == len(PROMPTS)


def test_usage_counts_prompt_and_answer_as_one_server_does(flowkv_pair, plain_server, model):
    def usage(url: str) -> tuple[int, int]:
        with client(url) as api:
            reply = api.completions.create(model=model, prompt=PROMPTS[0], max_tokens=7, temperature=0)
        assert reply.usage is not None
        return reply.usage.prompt_tokens, reply.usage.completion_tokens

    assert usage(flowkv_pair.url) == usage(plain_server.url)


def test_a_client_that_leaves_frees_both_sides(flowkv_pair, model):
    with client(flowkv_pair.url) as api:
        stream = api.completions.create(
            model=model, prompt=PROMPTS[1], max_tokens=4000, temperature=0, stream=True
        )
        next(iter(stream))
        assert samples(flowkv_pair.decode.url)["vllm:num_requests_running"] == 1
        stream.close()
    wait_until(lambda: both_at_rest(flowkv_pair))


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x " * 20_000, "max_tokens": 4},
        {"prompt": "hello", "max_tokens": -1},
        {"prompt": [1, 10**9], "max_tokens": 4},
        {"prompt": "hello", "temperature": -3},
    ],
    ids=["too long", "negative length", "foreign token", "negative temperature"],
)
def test_a_bad_request_is_refused_as_one_server_does_and_both_live_on(flowkv_pair, plain_server, model, body):
    def status(url: str) -> int:
        with client(url) as api, pytest.raises(openai.APIStatusError) as caught:
            api.completions.create(model=model, **body)
        return caught.value.status_code

    assert status(flowkv_pair.url) == status(plain_server.url) == 400
    with client(flowkv_pair.url) as api:
        assert api.completions.create(model=model, prompt=PROMPTS[2], max_tokens=2).choices[0].text
    wait_until(lambda: both_at_rest(flowkv_pair))
