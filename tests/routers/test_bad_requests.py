"""What a client must not send: a clear 4xx, and never a fault of the proxy."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_engines import PATIENCE_S, Site, answer_with, completion, running_site

JSON = {"Content-Type": "application/json"}


async def refused(site: Site, raw: bytes, status: int, headers: dict[str, str] = JSON) -> str:
    """Send ``raw``; it must be answered with ``status`` and an OpenAI error, and reach no server."""
    async with site.http.post(f"{site.url}/v1/completions", data=raw, headers=headers) as response:
        assert response.status == status, await response.text()
        error = (await response.json())["error"]
    assert error["code"] == status
    assert response.headers["X-Request-Id"]
    assert site.prefill[0].requests == site.decode[0].requests == []
    return error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"3",
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
async def test_a_body_that_is_no_json_object(site: Site, raw: bytes) -> None:
    assert "body" in await refused(site, raw, 400)


@pytest.mark.parametrize("key", ["kv_transfer_params", "ec_transfer_params"])
@pytest.mark.parametrize(
    "value", [{"do_remote_prefill": True, "remote_host": "evil", "remote_port": 1}, {}, [], "x", 0, False]
)
async def test_a_client_must_not_say_where_a_server_pulls_from(site: Site, key: str, value: object) -> None:
    for body in (completion(**{key: value}), completion(vllm_xargs={key: value})):
        assert key in await refused(site, json.dumps(body).encode(), 400)


async def test_a_repeated_key_does_not_hide_another(site: Site) -> None:
    """Every server sees the body as the proxy has read it, whatever reader it uses."""
    raw = b'{"prompt": "x", "kv_transfer_params": {"remote_host": "evil"}, "kv_transfer_params": null}'
    response = await site.http.post(f"{site.url}/v1/completions", data=raw, headers=JSON)
    assert response.status == 200
    assert site.decode[0].bodies[0]["kv_transfer_params"]["remote_host"] == "127.0.0.1"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_another_content_type(site: Site, kind: str) -> None:
    """A web page can make a browser send these to a local address without asking first."""
    assert kind in await refused(site, json.dumps(completion()).encode(), 415, {"Content-Type": kind})


async def test_a_body_above_the_limit() -> None:
    async with running_site(max_body_bytes=1000) as site:
        raw = json.dumps(completion(prompt="x" * 2000)).encode()
        assert "1000 bytes" in await refused(site, raw, 413)
        packed = gzip.compress(raw)
        assert len(packed) < 1000
        assert "1000 bytes" in await refused(site, packed, 413, JSON | {"Content-Encoding": "gzip"})


async def test_a_packed_body_is_unpacked_and_a_wrongly_packed_one_refused(site: Site) -> None:
    headers = JSON | {"Content-Encoding": "gzip"}
    await refused(site, b"no gzip at all", 400, headers)
    raw = gzip.compress(json.dumps(completion()).encode())
    response = await site.http.post(f"{site.url}/v1/completions", data=raw, headers=headers)
    assert response.status == 200
    assert site.decode[0].bodies[0]["prompt"] == "hello"


async def test_a_body_that_never_arrives() -> None:
    async with running_site(body_timeout_s=0.05) as site:
        host, port = site.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        assert answer.startswith(b"HTTP/1.1 408")
        writer.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("POST", "/v1/embeddings", 404)],
)
async def test_an_unknown_route_is_refused_in_openais_shape(
    site: Site, method: str, path: str, status: int
) -> None:
    async with site.http.request(method, site.url + path, json={}) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == status


async def test_a_request_id_that_could_forge_a_log_line_is_replaced(site: Site) -> None:
    for bad in ("x" * 5000, "é", " "):
        response = await site.http.post(
            f"{site.url}/v1/completions", json=completion(), headers={"X-Request-Id": bad}
        )
        given_id = response.headers["X-Request-Id"]
        assert given_id.isascii()
        assert 0 < len(given_id) <= 256


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LIMITS = st.sampled_from(["n", "seed", "max_tokens", "max_completion_tokens", "min_tokens", "logprobs"])
KEYS = st.sampled_from(["prompt", "messages", "stream", "echo", "vllm_xargs", "kv_transfer_params"])
OBJECTS = st.dictionaries(KEYS | LIMITS | st.text(max_size=5), VALUES, max_size=8)
BODIES = st.binary(max_size=50) | (VALUES | OBJECTS).map(lambda value: json.dumps(value).encode())


@pytest.fixture(scope="module")
def lasting_site() -> Iterator[tuple[asyncio.Runner, Site]]:
    """A site that lives as long as the examples of one property."""
    with asyncio.Runner() as runner:
        context = running_site()
        site = runner.run(context.__aenter__())
        site.decode[0].default = answer_with(b'{"choices": [{"index": 0}]}')
        yield runner, site
        runner.run(context.__aexit__(None, None, None))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=BODIES, chat=st.booleans())
def test_no_body_makes_the_proxy_fail(lasting_site, raw: bytes, chat: bool) -> None:
    runner, site = lasting_site

    async def ask() -> int:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        async with site.http.post(site.url + path, data=raw, headers=JSON) as response:
            assert "error" in (await response.json()) or response.status == 200
            return response.status

    status = runner.run(ask())
    assert status in (200, 400)
    if status == 200:
        sent = [b for b in site.prefill[0].bodies + site.decode[0].bodies if b.get("kv_transfer_params")]
        assert all(b["kv_transfer_params"].get("remote_host") in (None, "127.0.0.1") for b in sent)
    assert site.idle
    site.prefill[0].requests.clear()
    site.decode[0].requests.clear()
