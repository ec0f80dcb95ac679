"""Who asks, written into ``custom_params`` by a middleware of SGLang's server."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from penstock.plugins import asker_middleware
from penstock.plugins.asker_middleware import App, Scope
from penstock.plugins.askers import Askers
from penstock.plugins.sglang.settings import inherited, scheduler_config

PARAMETERS = ("custom_params",)
SAMPLING = ("sampling_params", *PARAMETERS)


class AskerMiddleware(asker_middleware.AskerMiddleware):
    """For the server that this process was asked to run."""

    places = {  # noqa: RUF012 - never changed
        "/generate": SAMPLING,
        "/v1/completions": PARAMETERS,
        "/v1/chat/completions": PARAMETERS,
        "/invocations": PARAMETERS,
        os.environ.get("AIP_PREDICT_ROUTE", "/vertex_generate"): ("parameters", *SAMPLING),
    }

    def __init__(self, app: App) -> None:
        super().__init__(app)
        config = scheduler_config(inherited())
        assert config is not None
        self._askers = Askers(config)

    def askers(self, scope: Scope) -> Askers:
        return self._askers


def launch_server(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around ``http_server.launch_server``. Innermost, so that a body was decompressed, and a key checked,
    before it is read."""
    from sglang.srt.entrypoints.http_server import app
    from starlette.middleware import Middleware

    app.user_middleware.append(Middleware(AskerMiddleware))
    return original(*args, **kwargs)
