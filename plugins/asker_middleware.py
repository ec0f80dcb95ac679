"""ASGI middleware of an engine's server: writes who asks into extra arguments, refuses what cannot be.

Only requests that can carry extra arguments are looked into; their answers, streams among them, pass
untouched.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

import msgspec

from penstock.plugins.askers import Askers, Headers
from penstock.schedulers.asking import AskingError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

Place = tuple[str, ...]
"""The names under which a JSON body has its extra arguments, the outermost first. A list on the way holds
several requests."""

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
    """Pure ASGI: nothing is buffered but the bodies that must be read. An engine's says where its paths have
    extra arguments, and who asks."""

    places: Mapping[str, Place]
    """By path, for JSON bodies."""
    forms: frozenset[str] = frozenset()
    """Paths that take forms, which are not rewritten: they count for nobody where API keys say who asks."""

    def __init__(self, app: App, *, largest_body_bytes: int = LARGEST_BODY_BYTES) -> None:
        self.app = app
        self._largest = largest_body_bytes

    def askers(self, scope: Scope) -> Askers:
        """Who decides, for the server that a connection is to."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        path = _path(scope)
        if path not in self.places and path not in self.forms:
            await self.app(scope, receive, send)
            return
        try:
            body = await self._body(receive)
            if body is None:
                return
            body = self._checked_form(scope, body) if path in self.forms else self._rewritten(scope, body)
        except Refusal as refusal:
            await _answer(send, refusal)
            return
        headers = [(name, value) for name, value in scope["headers"] if name not in LENGTHS]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.app({**scope, "headers": headers}, _replayed(body, receive), send)

    def _checked_form(self, scope: Scope, body: bytes) -> bytes:
        names = {place[0] for place in self.places.values()}
        if self.askers(scope).has_table:
            for name in names:
                if name.encode() in body:
                    raise Refusal(
                        400, f"{name}: given in a form, allowed: in none where API keys say who asks"
                    )
        return body

    def _rewritten(self, scope: Scope, body: bytes) -> bytes:
        fields = _fields(body)
        if fields is None:
            # The server reads JSON as this does, and refuses it.
            return body
        first, *inner = self.places[_path(scope) or ""]
        changes = _Changes(self.askers(scope), scope["headers"])
        value = changes.made(first, _plain(first, fields.get(first)), inner)
        return _encoded({**fields, first: value}) if changes.any else body

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
    """The path inside the application of a request with a body."""
    if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
        return None
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class _Changes:
    """Writes who asks into the extra arguments of one body; ``any`` says whether that changed it."""

    def __init__(self, askers: Askers, headers: Headers) -> None:
        self._askers = askers
        self._headers = headers
        self.any = False

    def made(self, name: str, value: Any, inner: Sequence[str]) -> Any:
        """``value``, which the body has under ``name``, with the extra arguments ``inner`` of it replaced."""
        if inner and isinstance(value, list):
            return [self.made(name, one, inner) for one in value]
        given = _object(name, value)
        if inner:
            return {**given, inner[0]: self.made(inner[0], given.get(inner[0]), inner[1:])}
        try:
            extra = self._askers.extra_args(self._headers, given)
        except AskingError as error:
            raise Refusal(400, str(error), error.field) from None
        self.any = self.any or extra != given
        return extra


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
