"""Servers of SGLang that change roles while the proxy is in front of them: no request is lost to it.

A scripted server waits for ever with a request that is meant for its old role, as SGLang's do for minutes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from scripted_engines import Site, eventually, hang, running_site, status, stream_then
from scripted_sglang import SwitchingServer, decode_room, read_rooms, sglang_answer

SOON = {"probe_interval_s": 0.02}
NEVER = {"probe_interval_s": 1e6}


def switching(prefill: int = 1, decode: int = 1, **config: Any):
    return running_site(prefill, decode, make=SwitchingServer, **config)


def engines(site: Site) -> list[Any]:
    return site.prefill + site.decode


def roles(site: Site) -> list[str]:
    """The role of each server, as the proxy sees it."""
    return [server.role for server in site.proxy._servers]


async def health(site: Site) -> tuple[int, dict[str, Any]]:
    async with site.http.get(f"{site.url}/health") as response:
        return response.status, await response.json()


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_that_meet_a_pair_in_its_new_roles_are_answered(stream: bool) -> None:
    async with switching(**SOON) as site:
        assert (await site.complete()).status == 200
        for number in range(1, 4):
            for server in engines(site):
                server.switch()
            answers = await asyncio.gather(*(site.complete(stream=stream) for _ in range(5)))
            assert [answer.status for answer in answers] == [200] * 5
            for answer in answers:
                assert "hello/None/3" in await answer.text()
            await eventually(lambda: site.idle)
            assert roles(site) == (["decode", "prefill"] if number % 2 else ["prefill", "decode"])


@pytest.mark.parametrize("wrong", ["prefill", "decode"])
async def test_a_failure_is_reason_to_ask_for_the_roles_at_once(wrong: str) -> None:
    """One of the two says that it does not know what to do with the request; no probe is due."""
    async with switching(**NEVER) as site:
        await eventually(lambda: all(server.roles_asked == 2 for server in engines(site)))
        failing = (site.prefill if wrong == "prefill" else site.decode)[0]
        for server in engines(site):
            server.switch()
        failing.script = [status(500, "no such room")]
        response = await site.complete(rid="mine")
        assert response.status == 200
        assert roles(site) == ["decode", "prefill"]
        await eventually(lambda: site.idle)
        assert site.metric("retries_total", role=wrong) == 1
        assert [len(server.requests) for server in engines(site)] == [2, 2]
        assert all("rid" not in server.bodies[1] for server in engines(site))


async def test_others_of_the_role_take_over_what_waits_at_one_that_left_it() -> None:
    async with switching(2, 2, **SOON) as site:
        left, kept = site.decode
        left.switch()
        answers = await asyncio.gather(*(site.complete() for _ in range(12)))
        assert [answer.status for answer in answers] == [200] * 12
        await eventually(lambda: roles(site) == ["prefill", "prefill", "prefill", "decode"])
        before = len(left.requests)
        assert [(await site.complete()).status for _ in range(6)] == [200] * 6
        assert len(left.requests) - before == 2, "it is one of three prefill servers now"
        assert {body["bootstrap_port"] for body in kept.bodies[-6:]} == {
            server.bootstrap_port for server in (*site.prefill, left)
        }


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_under_way_does_not_mind_that_its_prefill_server_has_another_role(
    stream: bool,
) -> None:
    async with switching(**SOON) as site:

        async def answer_when_released(server, request, body):
            await read_rooms(body)
            if stream:
                return await stream_then(2, hang)(server, request, body)
            await server.release.wait()
            return web.json_response(sglang_answer(request, body))

        site.decode[0].default = answer_when_released
        asked = asyncio.create_task(site.complete(stream=stream))
        await eventually(lambda: site.metric("prefill_seconds_count") == 1)
        site.prefill[0].switch()
        await eventually(lambda: roles(site) == ["decode", "decode"])
        site.decode[0].release.set()
        answer = await asked
        assert answer.status == 200
        assert "hello/None/3" in await answer.text()
        assert [len(server.requests) for server in engines(site)] == [1, 1]


async def test_without_a_server_of_a_role_requests_are_refused_until_there_is_one_again() -> None:
    async with switching(**SOON) as site:
        only = site.decode[0]
        only.switch()
        assert (await site.complete()).status == 503
        await eventually(lambda: roles(site) == ["prefill", "prefill"])
        code, said = await health(site)
        assert (code, said["decode"]) == (503, [])
        assert [server["url"] for server in said["prefill"]] == [server.url for server in engines(site)]
        refused = await site.complete()
        assert refused.headers["Retry-After"] == "1"
        assert (await refused.json())["error"]["message"] == "no healthy decode server"
        only.switch()
        await eventually(lambda: roles(site) == ["prefill", "decode"])
        assert (await site.complete()).status == 200


async def test_a_role_that_nobody_had_is_asked_for_when_a_request_comes() -> None:
    async with switching(**NEVER) as site:
        only = site.decode[0]
        await eventually(lambda: only.roles_asked == 2)
        only.switch()
        await site.proxy._fleet.ask_roles()
        assert roles(site) == ["prefill", "prefill"]
        only.switch()
        assert (await site.complete()).status == 200
        assert site.metric("retries_total", role="decode") == 0


async def test_a_proxy_that_starts_after_a_switch_takes_the_roles_that_servers_have() -> None:
    def switched(role: str) -> SwitchingServer:
        server = SwitchingServer(role)
        server.switch()
        return server

    async with running_site(make=switched, **NEVER) as site:
        assert roles(site) == ["decode", "prefill"]
        assert (await site.complete()).status == 200
        assert site.metric("server_healthy", role="prefill", server=site.decode[0].url) == 1


async def test_a_server_that_does_not_say_its_role_keeps_it() -> None:
    class Silent(SwitchingServer):
        silent = False

        async def _model_info(self, request):
            return await (status(500)(self, request, {}) if self.silent else super()._model_info(request))

    async with running_site(2, 2, make=Silent, **NEVER) as site:
        for server in engines(site):
            server.silent = True
            server.script = [status(500)]
        assert (await site.complete()).status == 502
        assert roles(site) == ["prefill", "prefill", "decode", "decode"]


async def test_answers_to_one_prompt_prefill_elsewhere_when_the_first_one_s_server_left_the_role() -> None:
    async with switching(2, 1, split_concurrency=1, **NEVER) as site:

        async def answer_then_switch(server, request, body):
            answer = await decode_room(server, request, body)
            (used,) = (one for one in site.prefill if one.requests)
            await eventually(lambda: used.active == 0)
            used.switch()
            await site.proxy._fleet.ask_roles()
            return answer

        site.decode[0].script = [answer_then_switch]
        assert (await site.complete(n=3)).status == 200
        assert sorted(roles(site)) == ["decode", "decode", "prefill"]
        (stayed,) = (server for server in site.prefill if server.role == "prefill")
        assert len(stayed.requests) == 2


async def test_servers_that_do_not_switch_are_not_asked_again() -> None:
    class Counting(SwitchingServer):
        def __init__(self, role: str) -> None:
            super().__init__(role)
            assert self.info is not None
            self.info["enable_pd_role_switch"] = False

    async with running_site(make=Counting, **SOON) as site:
        asked: list[Any] = engines(site)
        before = [server.probes for server in asked]
        await eventually(lambda: all(s.probes > was + 2 for s, was in zip(asked, before, strict=True)))
        assert [server.roles_asked for server in asked] == [0, 0]
