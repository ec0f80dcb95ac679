"""How SGLang comes to the sparse backend: its registry, and settings that are made before it reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from penstock.plugins.sglang.sparse_settings import (
    BACKEND,
    FLAG,
    is_asked_for,
    require_sparse,
    settle,
    sparse_config,
)


@dataclass(frozen=True, slots=True)
class Registered:
    """A backend in SGLang's registry of attention backends; ``make`` builds it for a model runner."""

    name: str
    make: Callable[[Any], Any]
    target: str = "sglang.srt.layers.attention.attention_registry:ATTENTION_BACKENDS"

    def register(self) -> None:
        """Add it; a second time without effect."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        register_attention_backend(self.name)(self.make)

    def in_place(self) -> bool:
        """Whether the registry has it."""
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        return ATTENTION_BACKENDS.get(self.name) is self.make


def make_backend(runner: Any) -> Any:
    """The backend of a model runner, as ``PENSTOCK_CONFIG`` has it.

    Raises:
        ConfigurationError: the model or the platform has no plain pool of pages.
        FeatureError: SGLang did not apply our hooks.
    """
    from penstock.plugins.sglang.features import SPARSE_ATTENTION
    from penstock.plugins.sglang.hooks import confirm
    from penstock.plugins.sglang.settings import inherited
    from penstock.plugins.sglang.sparse_backend import TacticBackend

    confirm(SPARSE_ATTENTION.hooks)
    config = sparse_config(inherited(), flag=True)
    assert config is not None
    return TacticBackend(runner, config)


def resolve_once(original: Callable[[Any], Any], settings: Any) -> Any:
    """Around ``ServerArgs.resolve_once``: a program that builds an engine asks by the section alone.

    Raises:
        ConfigurationError: settings that were given from Python, or the model, contradict sparse attention.
    """
    from penstock.plugins.sglang import plain_caches
    from penstock.plugins.sglang.settings import inherited

    config = sparse_config(inherited(), flag=is_asked_for(settings))
    assert config is not None
    require_sparse(settings, config)
    settle(settings)
    return plain_caches.resolve_once(original, settings, f"{FLAG} {BACKEND}")


BACKEND_HOOK = Registered(BACKEND, make_backend)
