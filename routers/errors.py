"""What goes wrong, and how a client is told: always OpenAI's error object."""

from __future__ import annotations

from typing import Literal

import msgspec
from aiohttp import web

from penstock.routers.pool import Server

FailureKind = Literal["connect", "disconnect", "timeout", "status", "garbage", "switched"]


class ProxyError(Exception):
    """An answer that the proxy gives by itself instead of a server's.

    ``retry_after_s``, where set, becomes the ``Retry-After`` header, whole seconds.
    """

    def __init__(self, status: int, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


class UpstreamFailure(Exception):
    """A server gave no usable answer, and no byte of one has reached the client.

    ``detail`` is for the client's error message: it names the role, never a server's address.
    """

    def __init__(
        self, server: Server, kind: FailureKind, detail: str, *, status: int = 0, retry_after: str = ""
    ) -> None:
        super().__init__(detail)
        self.server = server
        self.kind = kind
        self.detail = detail
        self.status = status
        self.retry_after = retry_after

    @property
    def retryable(self) -> bool:
        """Whether another server may do better. A timeout is not repeated: its client has waited enough."""
        return self.kind != "timeout"

    def as_proxy_error(self) -> ProxyError:
        """502 for a failed server, 503 for one that said so itself or has another role now, 504 for one that
        took too long."""
        if self.kind == "timeout":
            return ProxyError(504, self.detail)
        if self.kind == "switched":
            return ProxyError(503, self.detail, retry_after_s=1)
        if self.status == 503:
            after = int(self.retry_after) if self.retry_after.isdecimal() else 1
            return ProxyError(503, self.detail, retry_after_s=after)
        return ProxyError(502, self.detail)


class StreamBroken(Exception):
    """A server's answer ended too early, after a part of it has reached the client."""


TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


def error_body(status: int, message: str) -> bytes:
    """OpenAI's error object, with the same fields as vLLM's own."""
    kind = TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": status}})


def error_response(error: ProxyError) -> web.Response:
    """The HTTP answer for ``error``."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return web.Response(
        status=error.status,
        body=error_body(error.status, error.message),
        content_type="application/json",
        headers=headers,
    )


def error_event(status: int, message: str) -> bytes:
    """One server-sent event that carries the error object; OpenAI's clients raise it."""
    return b"data: " + error_body(status, message) + b"\n\n"
