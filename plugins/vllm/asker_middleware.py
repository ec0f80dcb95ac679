"""ASGI middleware of vLLM's server: writes who asks into extra arguments, refuses what cannot be.

``--request-scheduler`` adds it to ``--middleware``. Its configuration is where the server keeps it, in
``app.state.vllm_config``. Only requests that can carry extra arguments are looked into; their answers,
streams among them, pass untouched.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from penstock.plugins.askers import Askers
from penstock.plugins.configuration import scheduler_config
from penstock.schedulers.asking import AskingError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

XARGS = ("vllm_xargs",)
JSON_PATHS: dict[str, tuple[str, ...]] = {
    "/v1/completions": XARGS,
    "/v1/chat/completions": XARGS,
    "/v1/chat/completions/batch": XARGS,
    "/v1/responses": XARGS,
    "/v1/messages": XARGS,
    "/invocations": XARGS,
    "/inference/v1/generate": ("sampling_params", "extra_args"),
}
"""Where the JSON bodies of a path have the extra arguments."""
FORM_PATHS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
"""Forms are not rewritten: they count for nobody where API keys say who asks."""
LARGEST_BODY_BYTES = 64 << 20
"""What is held in memory of one body at most; images travel in bodies."""
LENGTHS = (b"content-length", b"transfer-encoding")


class Refusal(Exception):
    """An answer that ends a request here."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.field = field


class AskerMiddleware:
    """Pure ASGI: nothing is buffered but the bodies that must be read."""

    def __init__(self, app: App, *, largest_body_bytes: int = LARGEST_BODY_BYTES) -> None:
        self.app = app
        self._largest = largest_body_bytes
        self._askers: Askers | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        path = _path(scope)
        if path not in JSON_PATHS and path not in FORM_PATHS:
            await self.app(scope, receive, send)
            return
        askers = self._of(scope)
        try:
            body = await self._body(receive)
            if body is None:
                return
            body = _checked_form(askers, body) if path in FORM_PATHS else _rewritten(askers, scope, body)
        except Refusal as refusal:
            await _answer(send, refusal)
            return
        headers = [(name, value) for name, value in scope["headers"] if name not in LENGTHS]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.app({**scope, "headers": headers}, _replayed(body, receive), send)

    def _of(self, scope: Scope) -> Askers:
        if self._askers is None:
            vllm_config = scope["app"].state.vllm_config
            self._askers = Askers(scheduler_config(vllm_config.additional_config))
        return self._askers

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client has gone."""
        chunks: list[bytes] = []
        length = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunk = message.get("body", b"")
            length += len(chunk)
            if length > self._largest:
                raise Refusal(413, f"body: more than {self._largest} bytes")
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)


def _path(scope: Scope) -> str | None:
    """The path inside the application of a POST request."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _rewritten(askers: Askers, scope: Scope, body: bytes) -> bytes:
    fields = _fields(body)
    if fields is None:
        # vLLM reads JSON as this does, and refuses it.
        return body
    first, *rest = JSON_PATHS[_path(scope) or ""]
    outer = {first: _plain(first, fields.get(first))}
    holder, name = outer, first
    for inner in rest:
        holder[name] = holder = _object(name, holder[name])
        name = inner
    given = _object(name, holder.get(name))
    try:
        extra = askers.extra_args(scope["headers"], given)
    except AskingError as error:
        raise Refusal(400, str(error), error.field) from None
    if extra == given:
        return body
    holder[name] = extra
    return _encoded({**fields, first: outer[first]})


def _checked_form(askers: Askers, body: bytes) -> bytes:
    if askers.has_table and XARGS[0].encode() in body:
        raise Refusal(400, f"{XARGS[0]}: given in a form, allowed: in none where API keys say who asks")
    return body


def _object(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refusal(400, f"{name}: given {type(value).__name__}, allowed: an object", name)
    return value


def _fields(body: bytes) -> dict[str, Any] | None:
    """The fields of a JSON object, unread where possible; None for anything else."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        # What the server's own reader takes and msgspec does not: NaN, UTF-16, a byte order mark.
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _plain(name: str, value: Any) -> Any:
    if not isinstance(value, msgspec.Raw):
        return value
    try:
        return json.loads(bytes(value))
    except (ValueError, RecursionError):
        raise Refusal(400, f"{name}: cannot be read", name) from None


def _encoded(fields: Mapping[str, Any]) -> bytes:
    if not any(isinstance(value, msgspec.Raw) for value in fields.values()):
        return json.dumps(fields).encode()
    raw = {
        name: value if isinstance(value, msgspec.Raw) else msgspec.Raw(json.dumps(value).encode())
        for name, value in fields.items()
    }
    return msgspec.json.encode(raw)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body at once, and then whatever follows it."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _answer(send: Send, refusal: Refusal) -> None:
    error = {
        "message": str(refusal),
        "type": "BadRequestError",
        "param": refusal.field,
        "code": refusal.status,
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
