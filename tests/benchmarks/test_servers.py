from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from penstock.benchmarks import servers
from penstock.benchmarks.processes import Server, ServerError
from penstock.benchmarks.servers import Engine, console_script, engine_server, proxy_server


@pytest.fixture
def make(tmp_path, monkeypatch) -> Iterator:
    monkeypatch.setattr(servers, "has_gpu", lambda: False)
    monkeypatch.setattr(servers, "console_script", lambda name: f"/bin/{name}")
    with ExitStack() as stack:

        def make(**options: object) -> Server:
            server = engine_server(Engine(**{"model": "m", **options}), tmp_path)
            stack.callback(server.stop)
            return server

        yield make


def value_of(server: Server, option: str) -> str:
    return server.command[list(server.command).index(option) + 1]


def test_a_plain_server_has_no_connector_and_listens_on_loopback_only(make):
    server = make()
    assert server.command[:3] == ["/bin/vllm", "serve", "m"]
    assert not [word for word in server.command if word.startswith("--kv-")]
    assert value_of(server, "--host") == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{value_of(server, '--port')}"


@pytest.mark.parametrize(("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_flowkv_takes_the_one_flag(make, role, kv_role):
    server = make(role=role, connector="flowkv")
    assert value_of(server, "--kv-connector") == "flowkv"
    assert value_of(server, "--kv-role") == kv_role
    assert server.name == f"flowkv-{role}"


def test_a_stock_connector_is_configured_without_penstock(make):
    server = make(role="decode", connector="NixlConnector")
    assert json.loads(value_of(server, "--kv-transfer-config")) == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_consumer",
        "kv_buffer_device": "cpu",
    }


def test_servers_share_no_port_not_even_a_side_channel(make):
    made = [make() for _ in range(5)]
    ports = [port.number for server in made for port in (server.port, *server.extra_ports)]
    assert len(set(ports)) == 10
    assert made[0].environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == str(made[0].extra_ports[0].number)


def test_a_float32_checkpoint_is_served_in_float32(make, tmp_path):
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    assert value_of(make(model=str(tmp_path)), "--dtype") == "float32"
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    assert "--dtype" not in make(model=str(tmp_path)).command


def test_an_engine_s_own_environment_wins(make):
    server = make(threads=2, environment={"VLLM_CPU_KVCACHE_SPACE": "7"})
    assert server.environment["OMP_NUM_THREADS"] == "2"
    assert server.environment["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_the_proxy_knows_every_server(make, tmp_path):
    prefill, decode, another = make(role="prefill"), make(role="decode"), make(role="decode")
    proxy = proxy_server([prefill], [decode, another], tmp_path)
    proxy.stop()
    words = list(proxy.command)
    assert words[:2] == ["/bin/penstock", "proxy"]
    urls = [pair for pair in itertools.pairwise(words) if pair[0] in ("--prefill", "--decode")]
    assert urls == [("--prefill", prefill.url), ("--decode", decode.url), ("--decode", another.url)]


def test_a_command_beside_the_interpreter_is_preferred(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    (tmp_path / "sh").touch()
    assert console_script("sh") == str(tmp_path / "sh")
    assert Path(console_script("env")).is_absolute()
    with pytest.raises(ServerError, match="no-such-command"):
        console_script("no-such-command")
