"""A patch of one upstream attribute: idempotent, re-entrant and reversible."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MARK = "__penstock_original__"


def always() -> bool:
    """The patch is needed everywhere."""
    return True


@dataclass(frozen=True, slots=True)
class AttributePatch:
    """Replace ``target`` (``package.module:Class.attribute``) by what ``replace`` makes of the original.

    ``replace`` receives the attribute as the class holds it, a classmethod or staticmethod object included,
    and returns a function or such an object. The result carries the original, so that a second installation,
    from whichever copy of this object, finds it and does nothing.
    """

    target: str
    signature: str
    replace: Callable[[Any], Any]
    fingerprints: tuple[str, ...] = ()
    wraps: bool = False
    """True where the replacement calls the original, so that a changed body does not break it."""
    needed: Callable[[], bool] = always
    """Whether this installation needs the patch; where not, it is neither checked nor applied."""

    @property
    def module(self) -> str:
        """Dotted name of the module that defines the target."""
        return self.target.partition(":")[0]

    @property
    def installed(self) -> bool:
        """Whether the target is replaced in this process."""
        owner, name = self._resolve()
        return original_of(inspect.getattr_static(owner, name)) is not None

    def install(self) -> None:
        """Replace the target; a target that is already replaced is left alone.

        Raises:
            AttributeError: the target does not exist.
        """
        owner, name = self._resolve()
        current = inspect.getattr_static(owner, name)
        if original_of(current) is not None:
            return
        replacement = self.replace(current)
        setattr(getattr(replacement, "__func__", replacement), MARK, current)
        setattr(owner, name, replacement)

    def remove(self) -> None:
        """Put the original back; without effect where the patch is not installed."""
        owner, name = self._resolve()
        original = original_of(inspect.getattr_static(owner, name))
        if original is not None:
            setattr(owner, name, original)

    def _resolve(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *parents, name = self.target.partition(":")[2].split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name


def original_of(member: Any) -> Any:
    """The original that a replaced attribute carries, or None."""
    return getattr(getattr(member, "__func__", member), MARK, None)
