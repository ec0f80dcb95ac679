"""Our hooks, in SGLang's own registry of hooks.

SGLang applies what a plugin registered once all plugins have run, and only logs what it cannot apply. So a
feature's seams are verified before its hooks are registered, and ``confirm`` says afterwards whether they are
in place.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from penstock.plugins.features import FeatureError, Hook

_registered: set[tuple[str, Callable[..., Any]]] = set()


@runtime_checkable
class Placed(Hook, Protocol):
    """A hook of which one can see afterwards whether it is in place."""

    @property
    def target(self) -> str:
        """The upstream name that it changes."""
        ...

    def in_place(self) -> bool:
        """Whether it has changed it."""
        ...


@dataclass(frozen=True, slots=True)
class Around:
    """A function that SGLang calls as ``function(original, *arguments)`` in the place of ``target``
    (``package.module:Class.method``)."""

    target: str
    function: Callable[..., Any]

    def register(self) -> None:
        """Hand the hook to SGLang; a second time without effect."""
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        if (self.target, self.function) not in _registered:
            _registered.add((self.target, self.function))
            HookRegistry.register(self.target.replace(":", "."), self.function, HookType.AROUND)

    def in_place(self) -> bool:
        """Whether a call of the target comes by the hook."""
        return any(self.function is held for held in _held_by(pkgutil.resolve_name(self.target)))


@dataclass(frozen=True, slots=True)
class Instead:
    """A class that SGLang takes in the place of ``target`` (``package.module:Class``)."""

    target: str
    kind: type

    def register(self) -> None:
        """Hand the hook to SGLang; a second time without effect."""
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        if (self.target, self.kind) not in _registered:
            _registered.add((self.target, self.kind))
            HookRegistry.register(self.target.replace(":", "."), self.kind, HookType.REPLACE)

    def in_place(self) -> bool:
        """Whether the target is ours."""
        return pkgutil.resolve_name(self.target) is self.kind


def apply_now() -> None:
    """Apply what is registered, where SGLang has applied its plugins' hooks already."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()


def confirm(hooks: Iterable[Hook]) -> None:
    """Check that hooks are in place; those of SGLang's registry and its enumerations can be looked at.

    Raises:
        FeatureError: one is not; another plugin's hook on the same target was applied before ours came, or
            SGLang's log says why.
    """
    for hook in hooks:
        if isinstance(hook, Placed) and not hook.in_place():
            raise FeatureError(f"SGLang did not apply our hook on {hook.target}; its log says why")


def _held_by(function: Any) -> Iterator[Any]:
    """What the wrappers around a function hold, the outermost first."""
    while function is not None:
        function = getattr(function, "__func__", function)
        for cell in getattr(function, "__closure__", None) or ():
            yield cell.cell_contents
        function = getattr(function, "__wrapped__", None)
