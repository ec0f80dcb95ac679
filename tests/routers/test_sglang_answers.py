"""In front of SGLang: what each server receives, and what the client gets back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from scripted_engines import (
    PATIENCE_S,
    Body,
    EngineServer,
    Site,
    completion,
    eventually,
    hang,
    running_site,
    stream_then,
)
from scripted_sglang import generation, rooms_of, sglang_site


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with sglang_site() as running:
        yield running


async def ask(site: Site, path: str = "/v1/completions", **fields: object) -> bytes:
    body = generation(**fields) if path == "/generate" else completion(**fields)
    async with site.http.post(site.url + path, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.read()


def events(raw: bytes) -> list[Body]:
    *chunks, done = raw.removesuffix(b"\n\n").split(b"\n\n")
    assert done == b"data: [DONE]"
    return [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]


async def test_both_servers_get_the_request_with_one_room(site: Site) -> None:
    raw = await ask(site, stream=True, stream_options={"include_usage": True}, seed=7, stop=["x"], n=1)
    assert [event["choices"][0]["text"] for event in events(raw)[:-1]] == [f"hello/7/{i} " for i in range(4)]
    [at_prefill], [at_decode] = site.prefill[0].bodies, site.decode[0].bodies
    place = {key: at_decode[key] for key in ("bootstrap_host", "bootstrap_port", "bootstrap_room")}
    assert place["bootstrap_host"] == "127.0.0.1"
    assert place["bootstrap_port"] == site.prefill[0].bootstrap_port
    assert 0 <= place["bootstrap_room"] < 2**63
    asked = completion(stream=True, stream_options={"include_usage": True}, seed=7, stop=["x"], n=1)
    assert at_decode == asked | place
    # The first token is chosen by prefill: it needs all that shapes one.
    assert at_prefill == completion(stream=False, seed=7, stop=["x"], n=1) | place


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_decode_server_s_answer_passes_byte_for_byte(site: Site, path: str, stream: bool) -> None:
    sent = b"data: {  }\r\n\r\n: keep\n\n" if stream else b'{ "\\u0041":1e3}'

    async def odd(server, request, body):
        return web.Response(body=sent, content_type="text/event-stream" if stream else "application/json")

    site.decode[0].script = [odd]
    body = {"text": "x", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "stream": stream}
    async with site.http.post(site.url + path, json=body) as response:
        assert await response.read() == sent


async def test_a_stream_passes_as_it_comes(site: Site) -> None:
    site.decode[0].script = [stream_then(2, hang)]
    response = await site.complete(stream=True)
    first = await response.content.readuntil(b"\n\n") + await response.content.readuntil(b"\n\n")
    site.decode[0].release.set()
    assert len(events(first + await response.read())) == 4


async def test_several_prompts_are_one_request_whose_rooms_are_numbered_upwards(site: Site) -> None:
    await ask(site, prompt=["one", "two", "three"])
    [at_decode] = site.decode[0].bodies
    assert at_decode["prompt"] == ["one", "two", "three"]
    assert all(site.prefill[0].rooms[room].read.is_set() for room in rooms_of(at_decode))
    assert len(site.prefill[0].rooms) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_several_answers_to_a_prompt_are_requests_of_their_own(site: Site, stream: bool) -> None:
    raw = await ask(site, prompt=["a", "b"], n=2, seed=5, rid="mine", cache_salt=["s", "t"], stream=stream)
    bodies = sorted(site.decode[0].bodies, key=lambda body: (body["prompt"], body["seed"]))
    assert [(body["prompt"], body["seed"], body["cache_salt"]) for body in bodies] == [
        ("a", 5, "s"),
        ("a", 6, "s"),
        ("b", 5, "t"),
        ("b", 6, "t"),
    ]
    # SGLang takes an id once.
    assert all("rid" not in body and "n" not in body for body in bodies)
    assert len({body["bootstrap_room"] for body in bodies}) == 4
    answers = events(raw) if stream else [json.loads(raw)]
    assert len({answer["id"] for answer in answers}) == 1
    texts = ["", "", "", ""]
    for answer in answers:
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["".join(f"{prompt}/{seed}/{i} " for i in range(4)) for prompt in "ab" for seed in (5, 6)]


async def test_answers_to_one_prompt_prefill_at_one_server_after_the_first() -> None:
    async with sglang_site(prefill=2) as site:
        for server in site.prefill:
            server.script = [hang]
        asking = asyncio.create_task(ask(site, n=3))
        await eventually(lambda: sum(server.active for server in site.prefill) == 1)
        [leader] = [server for server in site.prefill if server.active]
        assert len(leader.requests) == 1
        leader.release.set()
        await asking
        assert len(leader.requests) == 3


@pytest.mark.parametrize(
    "key",
    [
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "bootstrap_pair_key",
        "decode_tp_size",
        "disagg_prefill_dp_rank",
    ],
)
@pytest.mark.parametrize("value", [0, "evil", [], [1]])
async def test_a_client_cannot_steer_a_transfer(site: Site, key: str, value: object) -> None:
    for path, body in (("/v1/completions", completion()), ("/generate", generation())):
        async with site.http.post(site.url + path, json=body | {key: value}) as response:
            assert response.status == 400
            assert key in (await response.json())["error"]["message"]
    assert site.prefill[0].requests == site.decode[0].requests == []


@pytest.mark.parametrize("sampling", [{"n": 2}, [{"n": 1}, {"n": 3}], {"n": "2"}, {"n": 0}])
async def test_generate_for_several_answers_to_a_prompt_is_refused(site: Site, sampling: object) -> None:
    async with site.http.post(f"{site.url}/generate", json=generation(sampling_params=sampling)) as response:
        assert response.status == 400
        assert "sampling_params.n must be 1" in (await response.json())["error"]["message"]


async def test_generate_is_not_a_route_of_vllm() -> None:
    async with running_site() as site, site.http.post(f"{site.url}/generate", json=generation()) as response:
        assert response.status == 404
        assert (await response.json())["error"]["message"] == "the servers have no /generate"


async def test_headers_pass_to_both_servers(site: Site) -> None:
    given = {"X-SMG-Routing-Key": "tenant", "X-Request-Id": "r1", "X-Override-Bootstrap-Room": "4"}
    async with site.http.post(f"{site.url}/v1/completions", json=completion(), headers=given) as response:
        assert response.headers["X-Request-Id"] == "r1"
    for server in (site.prefill[0], site.decode[0]):
        [(_, _, seen)] = server.requests
        assert seen["X-SMG-Routing-Key"] == "tenant"
        assert seen["X-Request-Id"] == "r1"
        assert "X-Override-Bootstrap-Room" not in seen


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_s_log_probabilities_come_from_prefill_on_generate(site: Site, stream: bool) -> None:
    raw = await ask(site, "/generate", text="p", return_logprob=True, logprob_start_len=0, stream=stream)
    for answer in events(raw) if stream else [json.loads(raw)]:
        assert answer["meta_info"]["input_token_logprobs"] == [[-0.5, 7, None]]
        assert len(answer["meta_info"]["output_token_logprobs"]) == 3


async def test_a_batch_s_log_probabilities_go_each_to_its_prompt(site: Site) -> None:
    raw = await ask(site, "/generate", text=["p", "q"], return_logprob=[True, True], logprob_start_len=[0, 0])
    found = [(answer["text"][0], answer["meta_info"]["input_token_logprobs"]) for answer in json.loads(raw)]
    assert found == [("p", [[-0.5, 7, None]]), ("q", [[-0.5, 7, None]])]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_s_log_probabilities_come_from_prefill_with_echo(site: Site, stream: bool) -> None:
    raw = await ask(site, echo=True, logprobs=1, stream=stream)
    answers = events(raw) if stream else [json.loads(raw)]
    tokens = [token for answer in answers for token in answer["choices"][0]["logprobs"]["tokens"]]
    assert tokens == ["prompt", "tokens", *(f"hello/None/{i} " for i in range(4))]


async def test_an_answer_waits_for_no_prefill_that_has_been_read(site: Site) -> None:
    """The prefill server says so late; meanwhile its request stays open and counted, and no one aborts it."""

    async def late(server: EngineServer, request, body):
        response = await server.well(server, request, body)
        await server.release.wait()
        return response

    site.prefill[0].script = [late]
    assert (await site.complete()).status == 200
    await eventually(lambda: site.decode[0].active == 0)
    assert site.servers("prefill")[0].in_flight == 1
    site.prefill[0].release.set()
    await eventually(lambda: site.idle)
    assert site.prefill[0].aborted == 0


async def test_a_hundred_at_once_meet_each_in_a_room_of_its_own() -> None:
    async with sglang_site(prefill=3, decode=3, connect_timeout_s=PATIENCE_S) as site:
        for server in site.decode:
            server.default = hang
        asking = asyncio.gather(*(ask(site, prompt=f"p{i}", seed=i, stream=i % 2 == 0) for i in range(100)))
        await eventually(lambda: sum(server.active for server in site.prefill + site.decode) == 200)
        assert max(server.active for server in site.prefill + site.decode) <= 35, "they share the load evenly"
        for server in site.decode:
            server.release.set()
        for i, raw in enumerate(await asking):
            assert all(f"p{i}/{i}/{k} ".encode() in raw for k in range(4))
        await eventually(lambda: site.idle)
        rooms = [body["bootstrap_room"] for server in site.decode for body in server.bodies]
        assert len(set(rooms)) == 100
