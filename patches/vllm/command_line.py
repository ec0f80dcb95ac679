"""Give the parsers that vLLM builds for engine arguments a chance to learn more options.

Why: ``vllm serve`` has no seam for options of a plugin. ``AsyncEngineArgs.add_cli_args`` loads the plugins
and then looks ``EngineArgs.add_cli_args`` up, so a plugin loaded in that call can still extend the parser.

Remove when: vLLM offers plugins a hook that receives the parser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from penstock.patches.attribute import AttributePatch


def extending(extend: Callable[[Any], None]) -> AttributePatch:
    """A patch after which every parser with vLLM's engine arguments is passed to ``extend``."""

    def replace(original: Any) -> Any:
        @wraps(original.__func__)
        def add_cli_args(parser: Any) -> Any:
            parser = original.__func__(parser)
            extend(parser)
            return parser

        return staticmethod(add_cli_args)

    return AttributePatch(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        signature="(parser)",
        replace=replace,
        fingerprints=("3c6cb1295ea8", "d49304bb9348", "34b13005223a", "ef4fead27a2f"),
        wraps=True,
    )
