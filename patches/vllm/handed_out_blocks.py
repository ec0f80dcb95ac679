"""Tell when the scheduler hands blocks of the KV cache to a request.

Why: an attention backend sees block tables, not whose they are. Whether a block still holds what it held in
the step before cannot be told from them: it may have gone to another request in between, or have been filled
by a KV connector. The worker hears of every block that changes hands before anyone reads it, in
``execute_model``.

Remove when: vLLM tells attention backends, or their metadata builders, which blocks are new to a request.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from penstock.patches.attribute import AttributePatch


def watching(hear: Callable[[Any, Any], None]) -> AttributePatch:
    """A patch after which ``hear(model_runner, scheduler_output)`` is called before each step."""

    def replace(original: Any) -> Any:
        @wraps(original)
        def execute_model(self: Any, scheduler_output: Any) -> Any:
            hear(self.model_runner, scheduler_output)
            return original(self, scheduler_output)

        return execute_model

    return AttributePatch(
        target="vllm.v1.worker.gpu_worker:Worker.execute_model",
        signature="(self, scheduler_output)",
        replace=replace,
        wraps=True,
    )
