"""The middleware of vLLM's server.

``--request-scheduler`` adds it to ``--middleware``. Its configuration is where the server keeps it, in
``app.state.vllm_config``.
"""

from __future__ import annotations

from penstock.plugins import asker_middleware
from penstock.plugins.asker_middleware import App, Scope
from penstock.plugins.askers import Askers
from penstock.plugins.configuration import scheduler_config

XARGS = ("vllm_xargs",)


class AskerMiddleware(asker_middleware.AskerMiddleware):
    """Who asks, into ``vllm_xargs``."""

    places = {  # noqa: RUF012 - never changed
        "/v1/completions": XARGS,
        "/v1/chat/completions": XARGS,
        "/v1/chat/completions/batch": XARGS,
        "/v1/responses": XARGS,
        "/v1/messages": XARGS,
        "/invocations": XARGS,
        "/inference/v1/generate": ("sampling_params", "extra_args"),
    }
    forms = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})

    def __init__(self, app: App, *, largest_body_bytes: int = asker_middleware.LARGEST_BODY_BYTES) -> None:
        super().__init__(app, largest_body_bytes=largest_body_bytes)
        self._askers: Askers | None = None

    def askers(self, scope: Scope) -> Askers:
        if self._askers is None:
            vllm_config = scope["app"].state.vllm_config
            self._askers = Askers(scheduler_config(vllm_config.additional_config))
        return self._askers
