"""Who asks: bad values are refused by name, nobody names itself another, other requests pass untouched."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from penstock.plugins.askers import digest_of
from penstock.plugins.sglang import asker_middleware as sglang_middleware
from penstock.plugins.sglang.settings import VARIABLE
from penstock.plugins.vllm.asker_middleware import AskerMiddleware

CLIENT = "x-llm-d-inference-fairness-id"
TTFT, TPOT = "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"
PATH = "/v1/completions"


class Site:
    """An ASGI application that tells what reached it, behind the middleware."""

    def __init__(self, scheduler: dict[str, Any] | None = None, **options: Any) -> None:
        additional = {"penstock": {"scheduler": scheduler or {}}}
        self.state = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional))
        self.middleware = AskerMiddleware(self.serve, **options)
        self.seen: list[tuple[dict[str, Any], bytes]] = []

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen.append((scope, body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for chunk in (b"one ", b"two"):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = self
        await self.middleware(scope, receive, send)

    async def post(self, body: Any = None, *, path: str = PATH, **more: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        transport = httpx.ASGITransport(app=self)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, content=content, **more)

    async def arrived(self, body: Any, **more: Any) -> dict[str, Any]:
        """The extra arguments that the server read."""
        answer = await self.post(body, **more)
        assert answer.status_code == 200, answer.text
        assert answer.text == "one two"
        scope, received = self.seen[-1]
        headers = dict(scope["headers"])
        assert headers[b"content-length"] == str(len(received)).encode()
        return json.loads(received).get("vllm_xargs") or {}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_the_body_s_own_words_arrive():
    given = {"client_id": "a", "weight": 2, "ttft_slo_ms": 500, "tpot_slo_ms": 40.5, "other": [1, 2]}
    assert await Site().arrived({"prompt": "x", "vllm_xargs": given}) == given


BAD = [
    ({"ttft_slo_ms": -1}, "ttft_slo_ms", "-1"),
    ({"ttft_slo_ms": 0}, "ttft_slo_ms", "0"),
    ({"ttft_slo_ms": 10**400}, "ttft_slo_ms", "too large to show"),
    ({"ttft_slo_ms": float("nan")}, "ttft_slo_ms", "nan"),
    ({"tpot_slo_ms": float("inf")}, "tpot_slo_ms", "inf"),
    ({"tpot_slo_ms": "40"}, "tpot_slo_ms", "'40'"),
    ({"tpot_slo_ms": True}, "tpot_slo_ms", "True"),
    ({"tpot_slo_ms": [40]}, "tpot_slo_ms", "list"),
    ({"weight": 0}, "weight", "0"),
    ({"weight": -1}, "weight", "-1"),
    ({"weight": 10**400}, "weight", "int too large"),
    ({"weight": 1e9}, "weight", "1000000000.0"),
    ({"weight": "heavy"}, "weight", "'heavy'"),
    ({"client_id": 7}, "client_id", "7"),
    ({"client_id": "x" * 129}, "client_id", "at most 128 bytes"),
    ({"client_id": "\u00e4" * 65}, "client_id", "at most 128 bytes"),
    ({"client_id": "a\nb"}, "client_id", "printable"),
    ({"client_id": "\ud800"}, "client_id", "printable"),
    ([], "vllm_xargs", "list"),
    ("a", "vllm_xargs", "str"),
]


@pytest.mark.parametrize(("given", "field", "shown"), BAD, ids=[f"{g!r:.40}" for g, *_ in BAD])
async def test_a_bad_value_is_refused_by_name(given, field, shown):
    site = Site()
    answer = await site.post({"prompt": "x", "vllm_xargs": given})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (field, 400, "BadRequestError")
    assert error["message"].startswith(field)
    assert shown in error["message"]
    assert len(error["message"]) < 300
    assert site.seen == []


async def test_headers_are_not_believed_unless_configured():
    headers = {CLIENT: "gateway", TTFT: "bad", TPOT: "40"}
    assert await Site().arrived({"prompt": "x"}, headers=headers) == {}


async def test_trusted_headers_outrank_the_body():
    site = Site({"trust_headers": True})
    headers = {CLIENT: "tenant", TTFT: "500", TPOT: "40"}
    found = await site.arrived({"vllm_xargs": {"client_id": "me", "keep": 1}}, headers=headers)
    assert found == {"client_id": "tenant", "ttft_slo_ms": 500.0, "tpot_slo_ms": 40.0, "keep": 1}


async def test_older_names_of_the_headers_are_known():
    headers = {"x-slo-ttft-ms": "500", "x-slo-tpot-ms": "40"}
    found = await Site({"trust_headers": True}).arrived({}, headers=headers)
    assert found == {"ttft_slo_ms": 500.0, "tpot_slo_ms": 40.0}


@pytest.mark.parametrize("text", ["", "fast", "-5", "nan", "inf", "1e30"])
async def test_a_bad_header_is_refused_by_its_own_name(text):
    answer = await Site({"trust_headers": True}).post({}, headers={TTFT: text})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == TTFT


async def test_a_header_given_twice_is_refused():
    headers = [(CLIENT, "a"), (CLIENT, "b")]
    answer = await Site({"trust_headers": True}).post({}, headers=headers)
    assert answer.json()["error"]["param"] == CLIENT


DIGEST = hashlib.sha256(b"key-b").hexdigest()
TABLE = {
    "clients": {"key-a": {"client": "a", "weight": 3}, f"sha256:{DIGEST}": {"client": "b"}},
}


@pytest.mark.parametrize(
    ("key", "found"),
    [("key-a", {"client_id": "a", "weight": 3.0}), ("key-b", {"client_id": "b"}), ("key-c", {})],
)
async def test_with_a_table_of_keys_nobody_names_itself(key, found):
    body = {"prompt": "x", "vllm_xargs": {"client_id": "other", "weight": 100, "ttft_slo_ms": 5}}
    arrived = await Site(TABLE).arrived(body, headers=bearer(key))
    assert arrived == {**found, "ttft_slo_ms": 5}


async def test_a_key_s_targets_outrank_the_request_s_own():
    gold = {"client": "g", "ttft_slo_ms": 500, "tpot_slo_ms": 40}
    site = Site(
        {"trust_headers": True, "clients": {"gold": gold, "plain": {"client": "p", "ttft_slo_ms": 900}}}
    )
    body = {"prompt": "x", "vllm_xargs": {"ttft_slo_ms": 5, "tpot_slo_ms": 7}}
    arrived = await site.arrived(body, headers=bearer("gold") | {TPOT: "1"})
    assert arrived == {"client_id": "g", "ttft_slo_ms": 500, "tpot_slo_ms": 40}
    arrived = await site.arrived(body, headers=bearer("plain") | {TPOT: "1"})
    assert arrived == {"client_id": "p", "ttft_slo_ms": 900, "tpot_slo_ms": 1}


ODD_FORMS = {
    "UTF-16": json.dumps({"vllm_xargs": {"client_id": "other"}}).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + b'{"vllm_xargs": {"client_id": "other"}}',
    "NaN beside it": b'{"temperature": NaN, "vllm_xargs": {"client_id": "other"}}',
    "huge integer beside it": b'{"seed": %d, "vllm_xargs": {"client_id": "other"}}' % 10**40,
    "given twice": b'{"vllm_xargs": {}, "vllm_xargs": {"client_id": "other"}}',
    "escaped name": b'{"vllm\\u005fxargs": {"client\\u005fid": "other"}}',
    "lone surrogate beside it": b'{"user": "\\ud800", "vllm_xargs": {"client_id": "other"}}',
}


@pytest.mark.parametrize("body", ODD_FORMS.values(), ids=ODD_FORMS)
async def test_no_form_of_json_smuggles_a_name_past_the_table(body):
    site = Site(TABLE)
    answer = await site.post(body, headers=bearer("key-a"))
    if answer.status_code == 400:
        assert site.seen == []
        return
    read = json.loads(site.seen[-1][1])
    assert read["vllm_xargs"]["client_id"] == "a"


async def test_sampling_parameters_of_token_requests_are_covered():
    site = Site(TABLE)
    body = {"token_ids": [1], "sampling_params": {"max_tokens": 3, "extra_args": {"client_id": "other"}}}
    await site.post(body, path="/inference/v1/generate", headers=bearer("key-a"))
    params = json.loads(site.seen[-1][1])["sampling_params"]
    assert params == {"max_tokens": 3, "extra_args": {"client_id": "a", "weight": 3.0}}


async def test_forms_cannot_name_a_client_where_keys_do():
    form = b'--b\r\nContent-Disposition: form-data; name="vllm_xargs"\r\n\r\n{"client_id": "other"}\r\n--b--'
    path = "/v1/audio/transcriptions"
    assert (await Site(TABLE).post(form, path=path)).status_code == 400
    assert (await Site().post(form, path=path)).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"[" * 100_000, b"\xff\xfe"])
async def test_what_is_no_object_is_left_to_the_server(body):
    site = Site(TABLE)
    answer = await site.post(body, headers=bearer("key-a"))
    assert answer.status_code == 200
    assert site.seen[-1][1] == body


async def test_untouched_bodies_are_byte_equal():
    body = b'{ "prompt" : "x",  "temperature":1e-3, "vllm_xargs":{ "client_id":"a" } }'
    site = Site()
    await site.post(body)
    assert site.seen[-1][1] == body


async def test_a_body_beyond_the_bound_is_refused():
    site = Site(largest_body_bytes=100)
    answer = await site.post({"prompt": "x" * 200})
    assert answer.status_code == 413
    assert site.seen == []


@pytest.mark.parametrize(
    ("method", "path"), [("GET", PATH), ("POST", "/tokenize"), ("POST", "/v1/embeddings")]
)
async def test_other_requests_pass_without_being_read(method, path):
    app_calls = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        app_calls.append((scope, receive, send))

    scope, receive, send = {"type": "http", "method": method, "path": path}, object(), object()
    await AskerMiddleware(app)(scope, receive, send)
    assert app_calls == [(scope, receive, send)]


async def test_a_path_below_a_root_is_found():
    site = Site(TABLE)
    transport = httpx.ASGITransport(app=site, root_path="/inner")
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        await client.post("/inner/v1/completions", json={}, headers=bearer("key-a"))
    assert json.loads(site.seen[-1][1])["vllm_xargs"]["client_id"] == "a"


async def test_a_client_that_left_is_not_answered():
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    site = Site()
    await site({"type": "http", "method": "POST", "path": PATH, "headers": []}, receive, send)
    assert site.seen == []


def test_a_digest_and_its_key_are_one():
    assert digest_of("key-b") == digest_of(f"sha256:{DIGEST}") == digest_of(f"sha256:{DIGEST.upper()}")
    assert digest_of("sha256:short") == hashlib.sha256(b"sha256:short").digest()


class SglangSite(Site):
    """The same behind the middleware of SGLang's server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scheduler: dict[str, Any]) -> None:
        super().__init__()
        monkeypatch.setenv(VARIABLE, json.dumps({"scheduler": scheduler}))
        self.middleware = sglang_middleware.AskerMiddleware(self.serve)

    async def put(self, path: str, body: Any, headers: dict[str, str]) -> Any:
        """What arrived of a PUT."""
        transport = httpx.ASGITransport(app=self)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            answer = await client.put(path, content=json.dumps(body).encode(), headers=headers)
        assert answer.status_code == 200, answer.text
        return json.loads(self.seen[-1][1])


GOLD = {"clients": {"key": {"client": "gold", "weight": 4}}}
MALLORY = {"custom_params": {"client_id": "gold", "mine": 1}}


@pytest.mark.parametrize(
    ("path", "body", "found"),
    [
        ("/generate", {"text": "x"}, lambda body: body["sampling_params"]["custom_params"]),
        ("/generate", {"sampling_params": MALLORY}, lambda body: body["sampling_params"]["custom_params"]),
        (
            "/generate",
            {"sampling_params": [{"n": 1}, MALLORY]},
            lambda body: body["sampling_params"][1]["custom_params"],
        ),
        ("/v1/completions", MALLORY, lambda body: body["custom_params"]),
        ("/v1/chat/completions", {"messages": []}, lambda body: body["custom_params"]),
        (
            "/vertex_generate",
            {"instances": [], "parameters": {"sampling_params": MALLORY}},
            lambda body: body["parameters"]["sampling_params"]["custom_params"],
        ),
    ],
)
async def test_on_sglang_a_key_says_who_asks_and_a_request_does_not(monkeypatch, path, body, found):
    for method in (None, "put"):
        site = SglangSite(monkeypatch, GOLD)
        for key, client in (("key", "gold"), ("other", None)):
            if method == "put":
                arrived = await site.put(path, body, bearer(key))
            else:
                await site.post(body, path=path, headers=bearer(key))
                arrived = json.loads(site.seen[-1][1])
            if client is None:
                assert "gold" not in json.dumps(arrived)
            else:
                assert found(arrived)["client_id"] == client
                assert found(arrived)["weight"] == 4


async def test_on_sglang_a_field_of_another_type_is_refused_by_name(monkeypatch):
    site = SglangSite(monkeypatch, {"trust_headers": True})
    for body, field in (
        ({"sampling_params": 5}, "sampling_params"),
        ({"sampling_params": {"custom_params": [1]}}, "custom_params"),
    ):
        answer = await site.post(body, path="/generate")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
