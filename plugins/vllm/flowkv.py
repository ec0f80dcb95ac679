"""Where vLLM's registry of connectors finds FlowKV's class.

Looking the class up is what asking for FlowKV means, whichever way the name was given, and it happens before
vLLM lays out its memory. So the feature is verified and applied here, before the adapter is imported.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "FlowKVConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from penstock.plugins.features import require
    from penstock.plugins.vllm.features import FLOWKV
    from penstock.plugins.vllm.installation import upstream

    require(FLOWKV, upstream())
    from penstock.plugins.vllm.connector import FlowKVConnector

    return FlowKVConnector
