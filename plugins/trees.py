"""Where seams are looked up: the source files of an engine, or the objects of this process."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import textwrap
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from penstock.patches.attribute import original_of
from penstock.plugins.seams import holds_self_attribute
from penstock.plugins.signatures import Definition, fingerprint, of_callable, of_node

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(slots=True)
class SourceTree:
    """Python source below ``root`` (the folder that holds the top-level package), read and never imported."""

    root: Path
    _parsed: dict[str, ast.Module | None] = field(default_factory=dict)
    _found: dict[tuple[str, tuple[str, ...]], Definition | None] = field(default_factory=dict)

    def lookup(self, module: str, path: tuple[str, ...]) -> Definition | None:
        """The definition of a name, or None where it does not exist."""
        key = (module, path)
        if key not in self._found:
            self._found[key] = self._find(module, path)
        return self._found[key]

    def _find(self, module: str, path: tuple[str, ...]) -> Definition | None:
        scope: ast.AST | None = self.parse(module)
        for name in path[:-1]:
            scope = _member(scope, name)
        found = _member(scope, path[-1])
        if isinstance(found, Function) and not _is_property(found):
            return Definition(of_node(found), cache(partial(fingerprint, found)))
        if found is not None:
            return Definition()
        if isinstance(scope, ast.ClassDef) and holds_self_attribute(scope, path[-1]):
            return Definition()
        return None

    def parse(self, module: str) -> ast.Module | None:
        """The syntax tree of a module, or None where no such file exists."""
        if module not in self._parsed:
            self._parsed[module] = self._read(module)
        return self._parsed[module]

    def function(self, module: str, path: tuple[str, ...]) -> Function | None:
        """The syntax tree of a function or method."""
        scope: ast.AST | None = self.parse(module)
        for name in path:
            scope = _member(scope, name)
        return scope if isinstance(scope, Function) else None

    def _read(self, module: str) -> ast.Module | None:
        base = self.root.joinpath(*module.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        return None


def _member(scope: ast.AST | None, name: str) -> ast.AST | None:
    if not isinstance(scope, ast.Module | ast.ClassDef):
        return None
    return next((node for node in _statements(scope.body) if name in _names(node)), None)


def _is_property(function: Function) -> bool:
    names = {node.id for node in function.decorator_list if isinstance(node, ast.Name)}
    return not names.isdisjoint(("property", "cached_property"))


def _statements(body: Iterable[ast.stmt]) -> Iterable[ast.stmt]:
    """Statements of a body, and those under its conditions."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)


def _names(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Assign():
            return {target.id for target in node.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Import() | ast.ImportFrom():
            return {alias.asname or alias.name for alias in node.names}
        case _:
            return set()


@dataclass(slots=True)
class LiveTree:
    """The objects of this process where a module is loaded, else its source file."""

    source: SourceTree

    def lookup(self, module: str, path: tuple[str, ...]) -> Definition | None:
        """The definition of a name, or None where it does not exist."""
        owner: Any = sys.modules.get(module)
        if owner is None:
            return self.source.lookup(module, path)
        for name in path[:-1]:
            owner = getattr(owner, name, None)
        member = inspect.getattr_static(owner, path[-1], None)
        if member is None:
            # Fields without a default and attributes set in __init__ are not on the class object.
            declared = self.source.lookup(module, path)
            return declared if declared is not None and declared.parameters is None else None
        return _define(member)


def _define(member: Any) -> Definition:
    if (original := original_of(member)) is not None:
        member = original
    function = getattr(member, "__func__", member)
    if not isinstance(function, types.FunctionType):
        return Definition()
    return Definition(of_callable(function), partial(_live_fingerprint, function))


def _live_fingerprint(function: types.FunctionType) -> str | None:
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError):
        return None
    return fingerprint(node) if isinstance(node, Function) else None


def installed_tree(package: str) -> SourceTree | None:
    """The source of an installed top-level package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return SourceTree(Path(spec.origin).parent.parent)
