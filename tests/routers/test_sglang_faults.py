"""In front of SGLang: servers that refuse, fail, hang or break off, and clients that leave.

A scripted server waits for its partner for ever, so a test ends only if the proxy ends what waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from scripted_engines import (
    Site,
    answer_with,
    completion,
    eventually,
    hang,
    hang_up,
    read_broken,
    server_that_accepts_nothing,
    status,
    stream_then,
)
from scripted_sglang import generation, read_rooms, sglang_site

from penstock.routers import concurrent


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with sglang_site() as running:
        yield running


async def message_of(response: aiohttp.ClientResponse) -> str:
    error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status
    assert "127.0.0.1" not in error["message"], "a client is not told the servers' addresses"
    return error["message"]


async def never(server, request, body):
    """A request that only its end at the proxy can end."""
    await asyncio.Event().wait()


def read_then(behaviour):
    """Take the prompt over, and then do ``behaviour``."""

    async def behave(server, request, body):
        await read_rooms(body)
        return await behaviour(server, request, body)

    return behave


FAULTS = [
    (hang_up, 502),
    (status(500, "transfer failed"), 502),
    (status(503, headers={"Retry-After": "9"}), 503),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(("fault", "code"), FAULTS)
async def test_the_other_server_does_not_wait_for_one_that_failed(
    site: Site, role: str, fault, code: int, stream: bool
) -> None:
    failing, waiting = (site.prefill, site.decode)[:: 1 if role == "prefill" else -1]
    waiting[0].default = never

    async def fail(server, request, body):
        await eventually(lambda: waiting[0].active == 1)
        return await fault(server, request, body)

    failing[0].default = fail
    response = await site.complete(stream=stream)
    assert response.status == code
    assert f"a {role} server" in await message_of(response)
    await eventually(lambda: site.idle)
    assert waiting[0].aborted == 1
    assert len(failing[0].requests) == len(waiting[0].requests) == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(("fault", "_code"), FAULTS)
async def test_a_failure_is_tried_once_at_another_couple_in_a_new_room(role: str, fault, _code) -> None:
    async with sglang_site(prefill=2, decode=2) as site:
        left = [fault]

        async def fail_once(server, request, body):
            return await (left.pop() if left else server.well)(server, request, body)

        for server in site.prefill if role == "prefill" else site.decode:
            server.default = fail_once
        response = await site.complete(rid="mine")
        assert response.status == 200
        await eventually(lambda: site.idle)
        assert [len(server.requests) for server in site.prefill + site.decode] == [1, 1, 1, 1]
        rooms = {body["bootstrap_room"] for server in site.decode for body in server.bodies}
        assert len(rooms) == 2
        assert sum("rid" in server.bodies[0] for server in site.decode) == 1
        assert site.metric("retries_total", role=role) == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_dead_server_is_avoided_and_comes_back(role: str) -> None:
    async with sglang_site(prefill=2, decode=2) as site:
        dead = (site.prefill if role == "prefill" else site.decode)[0]
        await dead.stop()
        assert [(await site.complete()).status for _ in range(6)] == [200] * 6
        await eventually(lambda: [s.healthy for s in site.servers(role)] == [False, True])
        await dead.start()
        await eventually(lambda: all(s.healthy for s in site.servers(role)))
        assert [(await site.complete()).status for _ in range(4)] == [200] * 4
        assert dead.requests


async def test_a_dead_prefill_server_alone_is_a_502_then_a_503_and_decode_is_free(site: Site) -> None:
    await site.prefill[0].stop()
    response = await site.complete()
    assert response.status in (502, 503)
    assert (await site.complete()).status == 503
    await eventually(lambda: site.idle)


async def test_an_ill_server_that_its_partner_complains_of_is_left_for_another() -> None:
    """One prefill server says that a transfer failed; it is decode that is ill."""
    async with sglang_site(prefill=1, decode=2) as site:
        left = [status(500, "decode did not read a chunk in time")]

        async def complain_once(server, request, body):
            return await (left.pop() if left else server.well)(server, request, body)

        site.prefill[0].default = complain_once
        assert (await site.complete()).status == 200
        assert len(site.prefill[0].requests) == 2
        assert sorted(len(server.requests) for server in site.decode) == [1, 1]


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_refusal_of_either_passes_unchanged_and_ends_the_other(site: Site, role: str) -> None:
    refusing, waiting = (site.prefill, site.decode)[:: 1 if role == "prefill" else -1]
    refusing[0].default = answer_with_status(400, b'{"object":"error","message":"too long"}')
    waiting[0].default = never
    response = await site.complete()
    assert response.status == 400
    assert await response.read() == b'{"object":"error","message":"too long"}'
    await eventually(lambda: site.idle)
    assert len(site.prefill[0].requests) == len(site.decode[0].requests) == 1


@pytest.mark.parametrize(
    "raw", [b'{"object":"error","message":"too slow"}', b'{"error":{"message":"too slow"}}']
)
async def test_a_failure_is_quoted_in_either_of_sglang_s_shapes(site: Site, raw: bytes) -> None:
    site.prefill[0].default = answer_with_status(500, raw)
    assert await message_of(await site.complete()) == "a prefill server answered 500: too slow"


def answer_with_status(code: int, raw: bytes):
    async def behave(server, request, body):
        return web.Response(status=code, body=raw, content_type="application/json")

    return behave


@pytest.mark.parametrize(
    ("path", "event"),
    [
        ("/v1/completions", b'{"error": {"message": "Lost connection", "code": 500}}'),
        (
            "/generate",
            b'{"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "Lost connection", '
            b'"status_code": 500}}}',
        ),
    ],
)
async def test_a_stream_that_begins_with_its_failure_is_no_answer(
    site: Site, path: str, event: bytes
) -> None:
    site.decode[0].default = answer_with(b"data: " + event + b"\n\ndata: [DONE]\n\n", "text/event-stream")
    body = generation(stream=True) if path == "/generate" else completion(stream=True)
    async with site.http.post(site.url + path, json=body) as response:
        assert response.status == 502
        assert await message_of(response) == "a decode server answered 500: Lost connection"
    await eventually(lambda: site.idle)


async def test_a_stream_that_begins_with_a_refusal_is_the_answer(site: Site) -> None:
    raw = b'data: {"error": {"message": "too long", "code": 400}}\n\ndata: [DONE]\n\n'
    site.decode[0].default = answer_with(raw, "text/event-stream")
    async with site.http.post(f"{site.url}/generate", json=generation(stream=True)) as response:
        assert await response.read() == raw


async def test_nothing_is_tried_again_after_the_first_byte() -> None:
    async with sglang_site(decode=2) as site:
        for server in site.decode:
            server.default = stream_then(2, hang_up)
        response = await site.complete(stream=True)
        await read_broken(response)
        assert sum(len(server.requests) for server in site.decode) == 1
        await eventually(lambda: site.idle)


@pytest.mark.parametrize("fault", [hang_up, status(500)])
async def test_a_prefill_that_fails_after_the_first_byte_changes_nothing(site: Site, fault) -> None:
    async def fail_late(server, request, body):
        await server.well(server, request, body)
        await eventually(lambda: site.metric("ttft_seconds_count") == 1)
        return await fault(server, request, body)

    site.prefill[0].default = fail_late
    site.decode[0].default = read_then(stream_then(2, hang))
    response = await site.complete(stream=True)
    await response.content.readuntil(b"\n\n")
    await eventually(lambda: site.prefill[0].active == 0)
    site.decode[0].release.set()
    assert (await response.read()).endswith(b"data: [DONE]\n\n")
    await eventually(lambda: site.idle)
    assert len(site.prefill[0].requests) == 1


@pytest.mark.parametrize(
    ("role", "setting"), [("prefill", "prefill_timeout_s"), ("decode", "first_byte_timeout_s")]
)
async def test_a_server_that_takes_too_long_is_a_504_and_not_asked_again(role: str, setting: str) -> None:
    async with sglang_site(prefill=2, decode=2, **{setting: 0.3}) as site:
        for server in site.prefill + site.decode:
            server.default = never
        response = await site.complete()
        assert response.status == 504
        assert f"a {role} server gave no answer within 0.3 s" in await message_of(response)
        await eventually(lambda: site.idle)
        assert sum(len(server.requests) for server in site.prefill + site.decode) == 2


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_without_a_server_of_either_role_no_request_is_sent(site: Site, role: str) -> None:
    server = (site.prefill if role == "prefill" else site.decode)[0]
    await server.stop()
    site.servers(role)[0].mark_down("scripted")
    response = await site.complete()
    assert response.status == 503
    assert await message_of(response) == f"no healthy {role} server"
    assert site.prefill[0].requests == site.decode[0].requests == []


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"choices": []}'])
async def test_log_probabilities_that_cannot_be_used_are_a_502(site: Site, answer: bytes) -> None:
    async def garbled(server, request, body):
        await server.well(server, request, body)
        return await answer_with(answer)(server, request, body)

    site.prefill[0].default = garbled
    response = await site.complete(echo=True, logprobs=1)
    assert response.status == 502
    assert "log probabilities" in await message_of(response)
    await eventually(lambda: site.idle)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_prefill_is_done_frees_both(site: Site, stream: bool) -> None:
    site.prefill[0].default = site.decode[0].default = never
    task = asyncio.create_task(site.complete(stream=stream))
    await eventually(lambda: site.prefill[0].active == site.decode[0].active == 1)
    task.cancel()
    await eventually(lambda: site.idle)
    assert site.prefill[0].aborted == site.decode[0].aborted == 1
    await eventually(lambda: site.metric("disconnects_total", stage="prefill") == 1)


async def test_a_client_that_leaves_between_prefill_and_the_first_byte_frees_decode(site: Site) -> None:
    site.decode[0].default = read_then(never)
    task = asyncio.create_task(site.complete())
    await eventually(lambda: site.metric("prefill_seconds_count") == 1)
    task.cancel()
    await eventually(lambda: site.idle)
    assert site.decode[0].aborted == 1
    await eventually(lambda: site.metric("disconnects_total", stage="decode") == 1)


async def test_a_client_that_leaves_in_mid_stream_frees_both(site: Site) -> None:
    """With several prompts the first byte may come while others are still being prefilled."""
    site.prefill[0].default = never
    site.decode[0].default = stream_then(2, hang)
    response = await site.complete(stream=True)
    await response.content.readuntil(b"\n\n")
    assert site.prefill[0].active == 1
    response.close()
    await eventually(lambda: site.idle)
    assert site.prefill[0].aborted == site.decode[0].aborted == 1
    await eventually(lambda: site.metric("disconnects_total", stage="stream") == 1)


async def test_a_client_that_leaves_while_a_server_cannot_be_reached_frees_the_other(site: Site) -> None:
    with server_that_accepts_nothing() as url:
        site.servers("prefill")[0].url = url
        site.decode[0].default = never
        task = asyncio.create_task(site.complete())
        await eventually(lambda: site.decode[0].active == 1)
        task.cancel()
        await eventually(lambda: site.idle)
    assert site.decode[0].aborted == 1


async def test_a_prefill_that_is_never_read_ends_soon_after_its_answer(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where decode gave up in mid-answer, the end of the request frees what prefill holds for it."""
    monkeypatch.setattr(concurrent, "PATIENCE_S", 0.05)
    site.prefill[0].default = never
    site.decode[0].default = stream_then(2, answer_with(b""))
    assert (await site.complete(stream=True)).status == 200
    await eventually(lambda: site.idle)
    assert site.prefill[0].aborted == 1


async def test_a_drain_lets_requests_finish_and_ends_what_is_left(site: Site) -> None:
    site.decode[0].script = [read_then(stream_then(1, hang))]
    staying = await site.complete(stream=True)
    site.prefill[0].default = site.decode[0].default = never
    cut = asyncio.create_task(site.complete(stream=True))
    await eventually(lambda: site.decode[0].active == 2)
    draining = asyncio.create_task(site.proxy.drain.finish(0.2))
    await eventually(lambda: site.proxy.drain.draining)
    assert (await site.complete()).status == 503
    site.decode[0].release.set()
    assert (await staying.read()).endswith(b"data: [DONE]\n\n")
    assert await draining == 1
    assert (await cut).status == 503
    await eventually(lambda: site.idle)
