"""What is installed: the version of SGLang and where its source lies, found without importing it."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from penstock.plugins.features import EngineMissing, Upstream
from penstock.plugins.trees import LiveTree, installed_tree

DISTRIBUTION = "sglang"


def installed_version() -> str | None:
    """The version of SGLang, or None where it is not installed."""
    found = next(iter(metadata.distributions(name=DISTRIBUTION)), None)
    return None if found is None else found.version


@cache
def upstream() -> Upstream:
    """The installed SGLang as features see it.

    Raises:
        EngineMissing: there is none.
    """
    source = installed_tree("sglang")
    if source is None:
        raise EngineMissing("SGLang is not installed; pip install 'penstock[sglang]'")
    return Upstream("sglang", installed_version() or "unknown", LiveTree(source))
