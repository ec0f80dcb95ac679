"""Seams: upstream names that a feature stands on, and the check that they are still as expected.

A seam is written ``package.module:Class.attribute``. The check looks at the live object where its module is
loaded, so that what another plugin has replaced is seen, and reads the source file where it is not, so
that no engine module is imported for the sake of a check. The source of any version is checked the same way.
"""

from __future__ import annotations

import ast
import enum
from dataclasses import dataclass
from typing import Protocol

from penstock.plugins.signatures import Definition, Parameter, parse_signature, render


class Use(enum.Enum):
    """How a feature uses an upstream name; it decides which changes of the name break the feature."""

    CALL = "call"
    """We call it: parameters that upstream adds must have defaults."""
    OVERRIDE = "override"
    """Upstream calls ours: every parameter must be as expected."""
    READ = "read"
    """We read it: it must exist."""
    PATCH = "patch"
    """We replace or wrap it: same parameters, and the source that the patch was written against."""


class State(enum.Enum):
    """What the check of one seam found."""

    HOLDS = "holds"
    DRIFTED = "drifted"
    MOVED = "moved"


@dataclass(frozen=True, slots=True)
class Seam:
    """One upstream name, how it is used, and what is expected of it.

    ``signature`` is written as in source, defaults as ``=...``: ``(self, request, block_ids=...)``; None
    where the name is no function. ``fingerprints`` are those of the sources that a patch was written against.
    ``optional`` marks a name that not every supported version has; where it exists it must be as expected.
    ``wraps`` marks a patch that calls the original: it stays correct when the body changes, so a new
    fingerprint is a drift to report, not a reason to stay off.
    """

    name: str
    use: Use
    signature: str | None = None
    fingerprints: tuple[str, ...] = ()
    wraps: bool = False
    optional: bool = False

    @property
    def module(self) -> str:
        """The dotted name of the module that defines the seam."""
        return self.name.partition(":")[0]

    @property
    def path(self) -> tuple[str, ...]:
        """The names inside the module: ``("Class", "attribute")``."""
        return tuple(self.name.partition(":")[2].split("."))


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of checking one seam; ``reason`` is empty where the seam holds."""

    seam: Seam
    state: State
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.seam.name}: {self.reason or self.state.value}"


class Tree(Protocol):
    """Upstream code in which names are looked up."""

    def lookup(self, module: str, path: tuple[str, ...]) -> Definition | None:
        """The definition of a name, or None where it does not exist."""
        ...


def check(seam: Seam, tree: Tree) -> Finding:
    """Compare one seam with the upstream code in ``tree``."""
    found = tree.lookup(seam.module, seam.path)
    if found is None:
        return Finding(seam, State.HOLDS if seam.optional else State.MOVED, "not found")
    if seam.signature is not None:
        if found.parameters is None:
            return Finding(seam, State.MOVED, f"expected a function {seam.signature}, found a value")
        expected = parse_signature(seam.signature)
        if not _compatible(seam.use, expected, found.parameters):
            reason = f"expected {render(expected)}, found {render(found.parameters)}"
            return Finding(seam, State.MOVED, reason)
    if seam.fingerprints and (digest := found.digest()) not in seam.fingerprints:
        state = State.DRIFTED if seam.wraps else State.MOVED
        known = ", ".join(seam.fingerprints)
        return Finding(seam, state, f"source has fingerprint {digest}, known are {known}")
    return Finding(seam, State.HOLDS)


def _compatible(use: Use, expected: tuple[Parameter, ...], found: tuple[Parameter, ...]) -> bool:
    if use is Use.CALL:
        return _binds(expected, found)
    fixed = tuple(parameter for parameter in expected if not parameter.variadic)
    if len(expected) == len(fixed) + 2:
        # ``*args, **kwargs`` at the end: whatever else upstream passes is passed on.
        return found[: len(fixed)] == fixed
    return expected == found


def _binds(expected: tuple[Parameter, ...], found: tuple[Parameter, ...]) -> bool:
    """Whether a call with the expected parameters is a valid call of the found function."""
    by_name = {parameter.name: parameter for parameter in found}
    known = {parameter.name for parameter in expected}
    same_order = [p.name for p in found if p.name in known] == [p.name for p in expected]
    return (
        same_order
        and all(by_name[p.name].accepts(p) for p in expected)
        and all(p.optional for p in found if p.name not in known)
    )


def holds_self_attribute(class_node: ast.ClassDef, name: str) -> bool:
    """Whether a method of the class assigns ``self.name``."""
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        for node in ast.walk(class_node)
    )
