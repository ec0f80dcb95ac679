"""What each server receives, and what the client gets back."""

from __future__ import annotations

import asyncio
import gzip

import openai
import pytest
from aiohttp import web
from scripted_engines import (
    PATIENCE_S,
    EngineServer,
    Site,
    answer_with,
    completion,
    hang,
    status,
    stream_then,
)

ASKED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def client_of(site: Site) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="secret", max_retries=0)


async def test_completion_goes_through_both_servers(site: Site) -> None:
    answer = await client_of(site).completions.create(model="m", prompt="hello", max_tokens=3)
    assert answer.choices[0].text == "hello/None/0 hello/None/1 hello/None/2 "
    assert len(site.prefill[0].requests) == len(site.decode[0].requests) == 1


async def test_streamed_completion_carries_every_token_in_order(site: Site) -> None:
    stream = await client_of(site).completions.create(model="m", prompt="p", max_tokens=20, stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == "".join(f"p/None/{i} " for i in range(20))


async def test_chat_goes_through_both_servers(site: Site) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = await client_of(site).chat.completions.create(
        model="m", messages=messages, max_completion_tokens=2
    )
    assert answer.choices[0].message.content == "hi/None/0 hi/None/1 "
    assert site.prefill[0].requests[0][0] == site.decode[0].requests[0][0] == "/v1/chat/completions"
    assert site.prefill[0].bodies[0]["messages"] == messages


async def test_streamed_chat_with_usage(site: Site) -> None:
    stream = await client_of(site).chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert [c.choices[0].delta.content for c in chunks[:-1]] == [f"hi/None/{i} " for i in range(5)]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


async def test_prefill_gets_one_token_and_the_question_for_a_handoff(site: Site) -> None:
    await site.complete(
        stream=True,
        stream_options={"include_usage": True},
        min_tokens=4,
        logprobs=3,
        stop=["x"],
        stop_token_ids=[5],
        temperature=0.5,
        cache_salt="s",
        vllm_xargs={"client_id": "c"},
    )
    assert site.prefill[0].bodies[0] == {
        "model": "m",
        "prompt": "hello",
        "max_tokens": 1,
        "stream": False,
        "ignore_eos": True,
        "temperature": 0.5,
        "cache_salt": "s",
        "vllm_xargs": {"client_id": "c"},
        "kv_transfer_params": ASKED,
    }


async def test_chat_prefill_is_cut_to_one_token_whichever_limit_the_client_used(site: Site) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], field: 50}
        await site.http.post(f"{site.url}/v1/chat/completions", json=body)
    for seen in site.prefill[0].bodies:
        assert (seen["max_tokens"], seen["max_completion_tokens"]) == (1, 1)


async def test_decode_gets_the_original_body_and_the_parameters_unchanged(site: Site) -> None:
    body = completion(stream=True, min_tokens=2, stop=["x"], seed=3, logit_bias={"5": -1.5}, big=2**63 + 1)
    await site.http.post(f"{site.url}/v1/completions", json=body)
    seen = dict(site.decode[0].bodies[0])
    params = seen.pop("kv_transfer_params")
    assert seen == body
    assert params["remote_engine_id"] == site.prefill[0].url
    assert params["remote_block_ids"] == [[1, 7]]
    assert params["extra"] == {"nested": [1, None, "ü"]}


async def test_prefill_without_handoff_lets_decode_compute_the_prompt(site: Site) -> None:
    site.prefill[0].script = [answer_with(b'{"choices": [], "kv_transfer_params": null}')]
    response = await site.complete()
    assert response.status == 200
    assert "kv_transfer_params" not in site.decode[0].bodies[0]
    assert site.metric("prefills_without_handoff_total") == 1


async def test_headers_that_matter_reach_both_servers_and_others_none(site: Site) -> None:
    passed = {
        "Authorization": "Bearer secret",
        "X-Request-Id": "my-id",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "X-Session-ID": "s1",
        "X-Vllm-Priority": "3",
        "x-llm-d-inference-fairness-id": "tenant",
        "x-llm-d-slo-ttft-ms": "200",
    }
    kept = {"X-data-parallel-rank": "1", "Cookie": "a=b", "X-Forwarded-For": "1.2.3.4"}
    await site.http.post(f"{site.url}/v1/completions", json=completion(), headers=passed | kept)
    for server in (site.prefill[0], site.decode[0]):
        seen = {name.lower(): value for name, value in server.requests[0][2].items()}
        assert {name: seen.get(name.lower()) for name in passed} == passed
        assert not [name for name in kept if name.lower() in seen]


async def test_a_request_id_is_made_for_both_and_told_to_the_client(site: Site) -> None:
    response = await site.complete()
    ids = {server.requests[0][2]["X-Request-Id"] for server in (site.prefill[0], site.decode[0])}
    assert ids == {response.headers["X-Request-Id"]}


async def test_streamed_answer_is_passed_on_byte_for_byte(site: Site) -> None:
    raw = b': keep-alive\n\ndata: {"a":1}\n\nevent: odd\r\ndata: \xff\xfe\r\n\r\ndata: [DONE]\n\n'
    site.decode[0].script = [answer_with(raw, "text/event-stream")]
    response = await site.complete(stream=True)
    assert await response.read() == raw
    assert response.headers["Content-Type"].startswith("text/event-stream")


async def test_an_answer_that_a_server_packs_all_the_same_is_passed_on_packed(site: Site) -> None:
    async def packed(server: EngineServer, request: web.Request, body: dict) -> web.Response:
        return web.Response(body=gzip.compress(b'{"choices": []}'), headers={"Content-Encoding": "gzip"})

    site.decode[0].script = [packed]
    response = await site.complete()
    assert response.headers["Content-Encoding"] == "gzip"
    assert await response.read() == b'{"choices": []}'
    assert site.decode[0].requests[0][2]["Accept-Encoding"] == "identity"


async def test_each_event_arrives_before_the_next_is_made(site: Site) -> None:
    site.decode[0].script = [stream_then(1, hang)]
    response = await site.complete(stream=True)
    first = await asyncio.wait_for(response.content.readuntil(b"\n\n"), PATIENCE_S)
    assert b"hello/None/0" in first
    assert not site.decode[0].release.is_set()
    site.decode[0].release.set()
    rest = await response.content.read()
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_a_client_that_does_not_read_holds_the_decode_server_back(site: Site) -> None:
    """Backpressure: an endless answer does not pile up in the proxy."""
    written = 0

    async def endless(server: EngineServer, request, body):
        nonlocal written
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while written < 1 << 30:
            await response.write(b"x" * (1 << 16))
            written += 1 << 16
        return response

    site.decode[0].script = [endless]
    response = await site.complete(stream=True)
    before = -1
    async with asyncio.timeout(PATIENCE_S):
        while written != before:
            before = written
            await asyncio.sleep(0.2)
    assert 0 < written < 1 << 26
    response.close()


async def test_models_come_from_a_decode_server(site: Site) -> None:
    models = await client_of(site).models.list()
    assert [model.id for model in models.data] == ["model-at-decode"]
    assert site.decode[0].requests[0][2]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("code", [400, 401, 404, 422, 429])
async def test_a_servers_4xx_is_passed_on_unchanged(site: Site, role: str, code: int) -> None:
    server = (site.prefill if role == "prefill" else site.decode)[0]
    server.script = [status(code, "no such model", {"Retry-After": "7"})]
    response = await site.complete()
    assert response.status == code
    assert (await response.json())["error"]["message"] == "no such model"
    assert response.headers["Retry-After"] == "7"
    assert len(site.decode[0].requests) == (role == "decode")
    assert site.metric("requests_total", route="/v1/completions", mode="handoff", status=str(code)) == 1
    assert site.metric("broken_streams_total") == 0


async def test_openai_client_raises_the_servers_error(site: Site) -> None:
    site.prefill[0].script = [status(404, "no such model")]
    with pytest.raises(openai.NotFoundError, match="no such model"):
        await client_of(site).completions.create(model="m", prompt="x")


@pytest.mark.parametrize(
    ("fields", "role"),
    [
        ({"max_tokens": 1}, "prefill"),
        ({"max_tokens": 0, "echo": True, "logprobs": 1}, "prefill"),
        ({"prompt_logprobs": 0}, "decode"),
        ({"echo": True, "logprobs": 0}, "decode"),
        ({"use_beam_search": True, "n": 2}, "decode"),
        ({"truncate_prompt_tokens": -1}, "decode"),
        ({"prompt_embeds": "AAAA", "prompt": None}, "decode"),
    ],
)
async def test_what_cannot_or_need_not_be_handed_over_runs_whole_at_one_server(
    site: Site, fields: dict, role: str
) -> None:
    body = completion(**fields)
    response = await site.http.post(f"{site.url}/v1/completions", json=body)
    assert response.status == 200
    asked, spared = (site.prefill[0], site.decode[0])[:: 1 if role == "prefill" else -1]
    assert asked.bodies == [body]
    assert spared.requests == []


@pytest.mark.parametrize("fields", [{"echo": True}, {"truncate_prompt_tokens": 8}, {"logprobs": 1}])
async def test_what_a_handoff_serves_well_is_handed_over(site: Site, fields: dict) -> None:
    await site.complete(**fields)
    assert site.decode[0].bodies[0]["kv_transfer_params"]["do_remote_prefill"] is True
