"""What the servers are: asked when they come up, said by an option, and refused where they do not fit."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from click.testing import CliRunner
from scripted_engines import EngineServer, completion, eventually, running_site, status
from scripted_sglang import SglangServer, generation, sglang_site

from penstock.routers.app import make_app
from penstock.routers.cli import proxy
from penstock.routers.config import ConfigError, ProxyConfig, split_prefill
from penstock.routers.pool import Server
from penstock.routers.sglang_bodies import meeting

A, B, C = "http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://[::1]:8000"


async def refused(servers: list[EngineServer], **config: Any) -> str:
    """What a proxy in front of ``servers`` that are up says when it does not start."""
    for server in servers:
        await server.start()
    try:
        ports = config.pop("ports", {})
        made = ProxyConfig(
            prefill=tuple(s.url for s in servers if s.role == "prefill"),
            decode=tuple(s.url for s in servers if s.role == "decode"),
            bootstrap_ports={servers[i].url: port for i, port in ports.items()},
            **config,
        )
        app = make_app(made)
        app.freeze()
        with pytest.raises(ConfigError) as caught:
            await app.startup()
        await app.cleanup()
        said = str(caught.value)
        assert "\n" not in said
        return said
    finally:
        for server in servers:
            await server.stop()


@pytest.mark.parametrize(("make", "engine"), [(EngineServer, "vllm"), (SglangServer, "sglang")])
@pytest.mark.parametrize("told", [False, True])
async def test_the_engine_is_found_out_or_said(make, engine: str, told: bool) -> None:
    async with running_site(make=make, **({"engine": engine} if told else {})) as site:
        async with site.http.get(f"{site.url}/health") as response:
            assert (await response.json())["engine"] == engine
        assert (await site.complete()).status == 200
        assert ("bootstrap_room" in site.decode[0].bodies[0]) == (engine == "sglang")


async def test_a_vllm_server_in_development_mode_has_another_server_info() -> None:
    class Development(SglangServer):
        def __init__(self, role: str) -> None:
            EngineServer.__init__(self, role)
            self.info = {"vllm_config": {}}

    async with running_site(make=Development) as site:
        assert (await site.complete()).status == 200
        assert "kv_transfer_params" in site.decode[0].bodies[0]


@pytest.mark.parametrize("first", [EngineServer, SglangServer])
async def test_engines_are_not_mixed(first) -> None:
    other = SglangServer if first is EngineServer else EngineServer
    said = await refused([first("prefill"), other("decode")])
    assert "runs vLLM" in said or "runs SGLang" in said
    assert said.endswith("a KV cache does not move between engines")


async def test_the_command_ends_with_that_line() -> None:
    servers = [SglangServer("prefill"), EngineServer("decode")]
    for server in servers:
        await server.start()
    options = ["--prefill", servers[0].url, "--decode", servers[1].url, "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from penstock.routers.cli import proxy; proxy()", *options,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    for server in servers:
        await server.stop()
    assert process.returncode == 1
    assert out == b""
    [line] = err.decode().splitlines()
    assert line.startswith("Error: http://127.0.0.1:")


@pytest.mark.parametrize(("mode", "role"), [("decode", "prefill"), ("null", "prefill"), ("null", "decode")])
async def test_a_server_in_another_role_is_refused(mode: str, role: str) -> None:
    servers = [SglangServer("prefill"), SglangServer("decode")]
    wrong = servers[role == "decode"]
    wrong.info = {"disaggregation_mode": mode}
    said = await refused(list(servers))
    assert said == f"{wrong.url} is given as a {role} server and runs with --disaggregation-mode {mode}"


async def test_servers_that_want_a_key_must_be_told() -> None:
    servers = [SglangServer("prefill"), SglangServer("decode")]
    for server in servers:
        server.info = None
    assert (await refused(list(servers))).endswith("give --engine vllm or sglang")
    assert f"--prefill {servers[0].url},PORT" in await refused(list(servers), engine="sglang")


async def test_a_bootstrap_port_that_is_given_is_not_asked_for() -> None:
    servers = [SglangServer("prefill"), SglangServer("decode")]
    for server in servers:
        server.info = None
        # It keeps its port.
        await server.start()
        await server.stop()
    given = {servers[0].url: servers[0].bootstrap_port}
    left = list(servers)
    async with running_site(make=lambda role: left.pop(0), engine="sglang", bootstrap_ports=given) as site:
        assert (await site.complete()).status == 200


async def test_a_bootstrap_port_of_a_vllm_server_is_refused() -> None:
    said = await refused([EngineServer("prefill"), EngineServer("decode")], ports={0: 8998})
    assert said.endswith("runs vLLM, which has no bootstrap port")


async def test_servers_that_come_up_later_are_asked_then() -> None:
    async with sglang_site(prefill=2) as site:
        late = site.prefill[1]
        await late.stop()
        site.servers("prefill")[1].mark_down("scripted")
        # Its successor at the same address has another bootstrap port.
        late.bootstrap_port += 10_000
        SglangServer.prefill_at[late.bootstrap_port] = late
        late.info = {
            "disaggregation_mode": "prefill",
            "disaggregation_bootstrap_port": late.bootstrap_port,
        }
        await late.start()
        await eventually(lambda: site.servers("prefill")[1].healthy)
        assert [(await site.complete()).status for _ in range(4)] == [200] * 4
        assert {body["bootstrap_port"] for body in late.bodies} == {late.bootstrap_port}


async def test_a_server_that_comes_back_as_something_else_gets_no_request(caplog) -> None:
    async with sglang_site(prefill=2) as site:
        changed = site.servers("prefill")[1]
        site.prefill[1].info = {"disaggregation_mode": "decode"}
        changed.mark_down("scripted")
        await eventually(lambda: "--disaggregation-mode decode" in changed.last_error)
        assert [(await site.complete()).status for _ in range(4)] == [200] * 4
        assert site.prefill[1].requests == []
        assert caplog.text.count("runs with --disaggregation-mode decode") >= 1
        site.prefill[1].info = {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 5}
        await eventually(lambda: changed.healthy)


async def test_before_any_server_has_said_what_it_is_there_is_none() -> None:
    async with (
        running_site(make=Down) as site,
        site.http.post(f"{site.url}/generate", json=generation()) as response,
    ):
        assert response.status == 503
        assert (await response.json())["error"]["message"] == "no healthy prefill server"


class Down(EngineServer):
    """A server that is not up yet: its health check fails."""

    def __init__(self, role: str) -> None:
        super().__init__(role)
        self.healthy = False


async def test_an_ipv6_host_is_written_in_brackets() -> None:
    body = meeting(completion(), Server("prefill", C, bootstrap_port=7), 3)
    assert (body["bootstrap_host"], body["bootstrap_port"], body["bootstrap_room"]) == ("[::1]", 7, 3)


def test_a_number_after_a_url_is_its_bootstrap_port() -> None:
    assert split_prefill((f"{A}/,8998,{B}", f"{C},9000")) == ((A, B, C), {A: 8998, C: 9000})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prefill", f"{A},70000", "--decode", B], "allowed is 1 to 65535"),
        (["--prefill", f"{A},1,2", "--decode", B], "http://"),
        (["--prefill", f"8998,{A}", "--decode", B], "http://"),
        (["--prefill", A, "--decode", f"{B},8998"], "http://"),
        (["--prefill", f"{A},8998", "--decode", B, "--engine", "vllm"], "which vLLM's servers do not know"),
        (["--prefill", A, "--decode", B, "--engine", "trt"], "'vllm', 'sglang', 'auto'"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(options: list[str], said: str) -> None:
    result = CliRunner().invoke(proxy, options)
    assert result.exit_code == 2
    assert said in result.output.splitlines()[-1]


async def test_a_server_whose_server_info_fails_is_asked_again() -> None:
    class Busy(EngineServer):
        asked = 0

        def add_routes(self, app) -> None:
            app.router.add_get("/server_info", self.answer)

        async def answer(self, request):
            self.asked += 1
            return await (status(500) if self.asked < 3 else status(404))(self, request, {})

    async with running_site(make=Busy) as site:
        await eventually(lambda: all(s.healthy for s in site.servers("prefill") + site.servers("decode")))
        assert (await site.complete()).status == 200
