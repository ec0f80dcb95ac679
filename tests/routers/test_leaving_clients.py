"""A client that leaves frees both servers, at whatever stage its request is."""

from __future__ import annotations

import asyncio

import pytest
from scripted_engines import (
    Site,
    completion,
    decode_well,
    eventually,
    hang,
    running_site,
    server_that_accepts_nothing,
    status,
    stream_then,
)

from penstock.routers.returns import refused_body


async def counted(site: Site, stage: str) -> None:
    """Wait until nothing is left of the request; it must be counted once, at ``stage``."""
    await eventually(lambda: site.idle)
    await eventually(lambda: site.metric("disconnects_total", stage=stage) == 1)
    stages = ("receive", "prefill", "handoff", "decode", "stream")
    assert sum(site.metric("disconnects_total", stage=name) for name in stages) == 1


async def test_while_its_body_is_under_way(site: Site) -> None:
    host, port = site.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b'Content-Length: 100\r\n\r\n{"prompt": '
    )
    await writer.drain()
    await eventually(lambda: site.proxy.drain.in_flight == 1)
    writer.close()
    await counted(site, "receive")
    assert site.prefill[0].requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_during_prefill(site: Site, stream: bool) -> None:
    site.prefill[0].script = [hang]
    task = asyncio.create_task(site.complete(stream=stream))
    await eventually(lambda: site.prefill[0].active == 1)
    task.cancel()
    await counted(site, "prefill")
    assert site.prefill[0].aborted == 1
    assert site.decode[0].requests == []


async def test_between_prefill_and_decode(site: Site) -> None:
    with server_that_accepts_nothing() as url:
        site.servers("decode")[0].url = url
        task = asyncio.create_task(site.complete())
        await eventually(lambda: site.servers("decode")[0].in_flight == 1)
        task.cancel()
        await counted(site, "handoff")
    assert site.metric("stranded_handoffs_total", reason="client_gone") == 1


@pytest.mark.parametrize("answer", [status(404, "no such model"), decode_well])
async def test_what_it_leaves_between_the_two_goes_back_through_another_decode_server(answer) -> None:
    async with running_site(decode=2) as site:
        site.decode[1].default = answer
        with server_that_accepts_nothing() as url:
            site.servers("decode")[0].url = url
            task = asyncio.create_task(site.complete())
            await eventually(lambda: site.servers("decode")[0].in_flight == 1)
            task.cancel()
            await eventually(lambda: site.metric("returned_handoffs_total") == 1)
        [body] = site.decode[1].bodies
        params = body["kv_transfer_params"]
        assert params["remote_request_id"] == site.prefill[0].requests[0][2]["X-Request-Id"]
        assert body == refused_body(params)
        assert site.metric("stranded_handoffs_total", reason="client_gone") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_byte_of_decode(site: Site, stream: bool) -> None:
    site.decode[0].script = [hang]
    task = asyncio.create_task(site.complete(stream=stream))
    await eventually(lambda: site.decode[0].active == 1)
    task.cancel()
    await counted(site, "decode")
    assert site.decode[0].aborted == 1
    assert site.metric("stranded_handoffs_total", reason="client_gone") == 0


async def test_in_mid_stream(site: Site) -> None:
    site.decode[0].script = [stream_then(2, hang)]
    response = await site.complete(stream=True)
    await response.content.readuntil(b"\n\n")
    response.close()
    await counted(site, "stream")
    assert site.decode[0].aborted == 1
    assert site.metric("requests_total", route="/v1/completions", mode="handoff", status="499") == 1


async def test_in_mid_stream_of_an_endless_answer_that_it_never_reads(site: Site) -> None:
    async def endless(server, request, body):
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(b"x" * (1 << 16))

    site.decode[0].script = [endless]
    response = await site.complete(stream=True)
    await response.content.readany()
    response.close()
    await counted(site, "stream")


async def test_fifty_at_once_at_mixed_stages_leave_nothing_behind() -> None:
    async with running_site(prefill=2, decode=2) as site:
        for server in (site.prefill[1], site.decode[1]):
            server.default = hang
        tasks = [
            asyncio.create_task(
                site.http.post(f"{site.url}/v1/completions", json=completion(stream=i % 2 == 0))
            )
            for i in range(50)
        ]
        await eventually(lambda: site.prefill[1].active + site.decode[1].active >= 10)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await site.http.close()
        await eventually(lambda: site.idle)
        assert site.prefill[1].aborted == len(site.prefill[1].requests)
