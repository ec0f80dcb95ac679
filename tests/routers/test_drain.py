"""The proxy as a process: start, signals, exit."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from scripted_engines import (
    PATIENCE_S,
    EngineServer,
    completion,
    eventually,
    hang,
    read_broken,
    running_site,
    stream_then,
)

PROGRAM = "from penstock.routers.cli import proxy; proxy()"


class Process:
    """``penstock proxy`` with one scripted server a role."""

    def __init__(
        self, process: asyncio.subprocess.Process, url: str, prefill: EngineServer, decode: EngineServer
    ) -> None:
        self.process = process
        self.url = url
        self.prefill = prefill
        self.decode = decode

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


@asynccontextmanager
async def running_process(*options: str) -> AsyncIterator[Process]:
    prefill, decode = EngineServer("prefill"), EngineServer("decode")
    await prefill.start()
    await decode.start()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, "--prefill", prefill.url, "--decode", decode.url, "--port", "0"),
        *options,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(2 * PATIENCE_S):
            line = (await process.stdout.readline()).decode()
        yield Process(process, line.split()[-1], prefill, decode)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for server in (prefill, decode):
            server.release.set()
            await server.stop()


async def begin_stream(http: aiohttp.ClientSession, running: Process) -> aiohttp.ClientResponse:
    """A streamed request whose first event is here and whose rest waits for ``release``."""
    running.decode.script = [stream_then(1, hang)]
    response = await http.post(f"{running.url}/v1/completions", json=completion(stream=True))
    await response.content.readuntil(b"\n\n")
    return response


async def until_draining(http: aiohttp.ClientSession, running: Process) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await (await http.get(f"{running.url}/health")).json())["status"] != "draining":
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_requests_finish_and_takes_no_new_ones(number: signal.Signals) -> None:
    async with running_process() as running, aiohttp.ClientSession() as http:
        response = await begin_stream(http, running)
        running.process.send_signal(number)
        await until_draining(http, running)
        late = await http.post(f"{running.url}/v1/completions", json=completion())
        assert late.status == 503
        assert int(late.headers["Retry-After"]) >= 1
        assert "shutting down" in (await late.json())["error"]["message"]
        running.decode.release.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert await running.ended() == 0
        assert len(running.prefill.requests) == 1


async def test_after_the_drain_timeout_what_is_left_is_cut_off() -> None:
    async with running_process("--drain-timeout", "0.05") as running, aiohttp.ClientSession() as http:
        response = await begin_stream(http, running)
        running.process.terminate()
        assert b"shutting down" in await read_broken(response)
        assert await running.ended() == 0
        await eventually(lambda: running.decode.aborted == 1)


async def test_a_second_signal_ends_it_at_once() -> None:
    async with running_process("--drain-timeout", "600") as running, aiohttp.ClientSession() as http:
        response = await begin_stream(http, running)
        running.process.terminate()
        await until_draining(http, running)
        running.process.terminate()
        assert b"shutting down" in await read_broken(response)
        assert await running.ended() == 0


async def test_without_requests_it_ends_at_once() -> None:
    async with running_process("--drain-timeout", "600") as running:
        running.process.terminate()
        assert await running.ended() == 0


async def test_a_request_cut_before_its_answer_is_told_so() -> None:
    async with running_site() as site:
        site.prefill[0].script = [hang]
        task = asyncio.create_task(site.complete())
        await eventually(lambda: site.prefill[0].active == 1)
        assert await site.proxy.drain.finish(0) == 1
        response = await task
        assert response.status == 503
        assert "shut down" in (await response.json())["error"]["message"]
        await eventually(lambda: site.idle)
        assert site.prefill[0].aborted == 1
        assert site.metric("disconnects_total", stage="prefill") == 0
