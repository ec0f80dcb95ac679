"""Servers that refuse, fail, hang or break off, and which of them a request meets next."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import openai
import pytest
from scripted_engines import (
    EngineServer,
    Site,
    answer_with,
    completion,
    eventually,
    hang,
    hang_up,
    read_broken,
    running_site,
    server_that_accepts_nothing,
    status,
    stream_then,
)

from penstock.routers.returns import NO_MODEL


async def error_of(response: aiohttp.ClientResponse) -> str:
    """The message of an error answer, whose shape must be OpenAI's."""
    error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status
    assert "127.0.0.1" not in error["message"], "a client is not told the servers' addresses"
    return error["message"]


def health_of(site: Site, role: str) -> list[bool]:
    return [server.healthy for server in site.servers(role)]


@pytest.mark.parametrize(
    "fault", [hang_up, status(500), status(503), answer_with(b"<html>"), answer_with(b"[]")]
)
async def test_a_failed_prefill_is_tried_once_on_another_server(fault) -> None:
    async with running_site(prefill=2) as site:
        site.prefill[0].default = fault
        for _ in range(4):
            response = await site.complete()
            assert response.status == 200
        assert site.metric("retries_total", role="prefill") == len(site.prefill[0].requests) > 0
        assert len(site.decode[0].requests) == 4


async def test_a_dead_prefill_server_is_avoided_and_comes_back() -> None:
    async with running_site(prefill=2) as site:
        await site.prefill[0].stop()
        assert [(await site.complete()).status for _ in range(6)] == [200] * 6
        await eventually(lambda: health_of(site, "prefill") == [False, True])
        await site.prefill[0].start()
        await eventually(lambda: health_of(site, "prefill") == [True, True])
        before = len(site.prefill[0].requests)
        await asyncio.gather(*(site.complete() for _ in range(4)))
        assert len(site.prefill[0].requests) > before


async def test_both_tries_failing_is_a_502_that_quotes_the_server() -> None:
    async with running_site(prefill=3) as site:
        for server in site.prefill:
            server.default = status(500, "out of memory")
        response = await site.complete()
        assert response.status == 502
        assert await error_of(response) == "a prefill server answered 500: out of memory"
        assert sum(len(server.requests) for server in site.prefill) == 2
        assert site.decode[0].requests == []


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("fault", "code"), [(hang_up, 502), (status(500), 502), (status(503, headers={"Retry-After": "9"}), 503)]
)
async def test_a_single_failing_server_is_a_clear_error(site: Site, role: str, fault, code: int) -> None:
    server = (site.prefill if role == "prefill" else site.decode)[0]
    server.default = fault
    response = await site.complete()
    assert response.status == code
    assert f"a {role} server" in await error_of(response)
    assert response.headers.get("Retry-After") == ("9" if code == 503 else None)
    assert len(server.requests) == 1
    await eventually(lambda: site.idle)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_no_healthy_server_is_a_503_with_retry_after(site: Site, role: str) -> None:
    server = (site.prefill if role == "prefill" else site.decode)[0]
    await server.stop()
    assert (await site.complete()).status in (502, 503)
    response = await site.complete()
    assert response.status == 503
    assert await error_of(response) == f"no healthy {role} server"
    assert int(response.headers["Retry-After"]) >= 1
    await server.start()
    await eventually(lambda: health_of(site, role) == [True])
    assert (await site.complete()).status == 200


async def test_without_a_decode_server_no_prefill_is_started(site: Site) -> None:
    await site.decode[0].stop()
    site.servers("decode")[0].mark_down("scripted")
    assert (await site.complete()).status == 503
    assert site.prefill[0].requests == []


async def test_decode_lost_after_prefill_counts_a_stranded_handoff(site: Site) -> None:
    site.prefill[0].script = [hang]
    task = asyncio.create_task(site.complete())
    await eventually(lambda: site.prefill[0].active == 1)
    await site.decode[0].stop()
    site.prefill[0].release.set()
    assert (await task).status in (502, 503)
    assert site.metric("stranded_handoffs_total", reason="decode_unreachable") == 1


@pytest.mark.parametrize("fault", [hang_up, status(500, "KV load failed")])
async def test_a_failed_decode_is_tried_once_elsewhere_with_a_new_prefill(fault) -> None:
    async with running_site(decode=2) as site:
        site.decode[0].default = site.decode[1].default = fault_once(fault)
        response = await site.complete()
        assert response.status == 200
        assert len(site.prefill[0].requests) == 2
        await eventually(lambda: site.metric("returned_handoffs_total") == 1)
        bodies = [body for server in site.decode for body in server.bodies]
        [returned] = [body for body in bodies if body["model"] == NO_MODEL]
        tried = [hand_off_number(body) for body in bodies if body["model"] != NO_MODEL]
        assert sorted(tried) == [1, 2]
        assert hand_off_number(returned) == 1
        assert site.metric("retries_total", role="decode") == 1
        assert site.metric("stranded_handoffs_total", reason="decode_failed") == 1


async def test_a_hand_off_that_no_server_takes_back_is_left_to_its_lease() -> None:
    async with running_site(decode=2) as site:
        site.decode[0].default = site.decode[1].default = hang_up
        assert (await site.complete()).status == 502
        await eventually(lambda: sum(len(server.requests) for server in site.decode) == 4)
    assert site.metric("stranded_handoffs_total", reason="decode_failed") == 1
    assert site.metric("returned_handoffs_total") == 0


async def test_a_handoff_that_no_server_has_heard_of_is_used_again(caplog: pytest.LogCaptureFixture) -> None:
    async with running_site(decode=2) as site:
        await site.decode[0].stop()
        responses = [await site.complete() for _ in range(3)]
        assert [response.status for response in responses] == [200] * 3
        assert len(site.prefill[0].requests) == 3
        assert site.metric("retries_total", role="decode") >= 1
        assert site.metric("stranded_handoffs_total", reason="decode_unreachable") == 0
        await eventually(lambda: f"{site.decode[0].url} is put aside" in caplog.text)


def hand_off_number(body) -> int:
    """Which of the prefill server's hand-offs a decode request carries."""
    return body["kv_transfer_params"]["remote_block_ids"][0][0]


def fault_once(fault):
    left = [fault]

    async def behave(server: EngineServer, request, body):
        return await (left.pop() if left else server.well)(server, request, body)

    return behave


async def test_nothing_is_tried_again_after_the_first_byte() -> None:
    async with running_site(decode=2) as site:
        for server in site.decode:
            server.default = stream_then(2, hang_up)
        response = await site.complete(stream=True)
        assert response.status == 200
        await read_broken(response)
        assert sum(len(server.requests) for server in site.decode) == 1
        assert len(site.prefill[0].requests) == 1
        assert site.metric("broken_streams_total") == 1
        assert site.metric("requests_total", route="/v1/completions", mode="handoff", status="502") == 1


async def test_a_stream_that_breaks_off_ends_with_an_error_event_and_no_done(site: Site) -> None:
    async def half_an_event(server, request, body):
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices": [')
        await site.decode[0].release.wait()
        request.transport.abort()
        return response

    site.decode[0].script = [half_an_event]
    response = await site.complete(stream=True)
    raw = await response.content.readany()
    site.decode[0].release.set()
    raw += await read_broken(response)
    head, event, end = raw.split(b"\n\n")
    assert head == b'data: {"choices": ['
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == 502
    assert end == b""


async def test_openai_client_raises_when_a_stream_breaks_off(site: Site) -> None:
    site.decode[0].script = [stream_then(2, hang_up)]
    client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="k", max_retries=0)
    stream = await client.completions.create(model="m", prompt="p", stream=True)
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass


async def test_a_whole_answer_cut_short_is_not_taken_for_complete(site: Site) -> None:
    async def short(server, request, body):
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"choices": [')
        request.transport.close()
        return response

    site.decode[0].script = [short]
    response = await site.complete()
    await read_broken(response)


@pytest.mark.parametrize(
    ("role", "setting"), [("prefill", "prefill_timeout_s"), ("decode", "first_byte_timeout_s")]
)
async def test_a_server_that_takes_too_long_is_a_504_and_not_asked_again(role: str, setting: str) -> None:
    async with running_site(prefill=2, decode=2, **{setting: 0.3}) as site:
        servers = site.prefill if role == "prefill" else site.decode
        for server in servers:
            server.default = hang
        response = await site.complete()
        assert response.status == 504
        assert "0.3 s" in await error_of(response)
        assert sum(len(server.requests) for server in servers) == 1
        await eventually(lambda: site.idle)


async def test_a_stream_that_falls_silent_is_ended(site: Site) -> None:
    async with running_site(idle_timeout_s=0.05) as site:
        site.decode[0].script = [stream_then(1, hang)]
        response = await site.complete(stream=True)
        assert b"sent nothing for 0.05 s" in await read_broken(response)
        await eventually(lambda: site.idle)


async def test_a_connection_that_cannot_be_opened_in_time_counts_as_failed() -> None:
    with server_that_accepts_nothing() as url:
        async with running_site(connect_timeout_s=0.1) as site:
            server = site.servers("prefill")[0]
            server.url = url
            assert (await site.complete()).status in (502, 503)
            assert not server.healthy


async def test_a_server_whose_health_goes_bad_is_put_aside_without_any_request() -> None:
    async with running_site(prefill=2, probe_interval_s=0.01) as site:
        site.prefill[0].healthy = False
        await eventually(lambda: health_of(site, "prefill") == [False, True])
        await asyncio.gather(*(site.complete() for _ in range(8)))
        assert site.prefill[0].requests == []
        site.prefill[0].healthy = True
        await eventually(lambda: health_of(site, "prefill") == [True, True])


async def test_a_proxy_started_before_its_servers_serves_when_they_are_up() -> None:
    async with running_site() as site:
        for server in site.prefill + site.decode:
            await server.stop()
        for server in site.servers("prefill") + site.servers("decode"):
            server.mark_down("scripted")
        response = await site.http.get(f"{site.url}/health")
        assert response.status == 503
        for server in site.prefill + site.decode:
            await server.start()
        await eventually(lambda: all(health_of(site, "prefill") + health_of(site, "decode")))
        assert (await site.http.get(f"{site.url}/health")).status == 200


async def test_least_in_flight_then_round_robin() -> None:
    async with running_site(prefill=2, decode=2) as site:
        site.decode[0].default = hang
        first = asyncio.create_task(site.complete())
        await eventually(lambda: site.decode[0].active == 1)
        for _ in range(4):
            assert (await site.complete()).status == 200
        assert [len(server.requests) for server in site.decode] == [1, 4]
        site.decode[0].release.set()
        assert (await first).status == 200
        assert sorted(len(server.requests) for server in site.prefill) == [2, 3]


async def test_two_hundred_requests_at_once_each_get_their_own_answer() -> None:
    async with running_site(prefill=3, decode=3) as site:
        site.prefill[0].default = fault_every_fifth()
        bodies = [completion(prompt=f"shared prefix {i}", stream=i % 2 == 0, seed=i) for i in range(200)]

        async def ask(i: int) -> bytes:
            async with site.http.post(f"{site.url}/v1/completions", json=bodies[i]) as response:
                assert response.status == 200
                return await response.read()

        for server in site.decode:
            server.default = hang
        asking = asyncio.gather(*(ask(i) for i in range(200)))
        await eventually(lambda: sum(server.active for server in site.decode) == 200)
        assert max(server.active for server in site.decode) <= 68, "the servers share the load evenly"
        for server in site.decode:
            server.release.set()
        answers = await asking
        for i, raw in enumerate(answers):
            for k in range(4):
                assert f"shared prefix {i}/{i}/{k} ".encode() in raw
            assert raw.count(b"shared prefix") == 4 if i % 2 == 0 else 1
        handed = {}
        for server in site.prefill:
            for _, body, headers in server.requests:
                handed[headers["X-Request-Id"]] = body["prompt"]
        for server in site.decode:
            for body in server.bodies:
                assert handed[body["kv_transfer_params"]["remote_request_id"]] == body["prompt"]
        assert site.idle


def fault_every_fifth():
    count = 0

    async def behave(server: EngineServer, request, body):
        nonlocal count
        count += 1
        return await (hang_up if count % 5 == 0 else server.well)(server, request, body)

    return behave
