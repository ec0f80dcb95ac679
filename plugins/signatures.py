"""Signatures and fingerprints of functions, the same whether taken from source or from a live object."""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FINGERPRINT_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: its name, its kind as ``inspect`` names it, and whether a caller may leave it out."""

    name: str
    kind: str
    optional: bool

    @property
    def variadic(self) -> bool:
        """Whether this is ``*args`` or ``**kwargs``."""
        return self.kind.startswith("VAR_")

    def accepts(self, wanted: Parameter) -> bool:
        """Whether a call written for ``wanted`` still binds to this parameter."""
        return self.kind == wanted.kind and (self.optional or not wanted.optional)

    def __str__(self) -> str:
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
        if self.kind in stars:
            return stars[self.kind] + self.name
        return f"{self.name}=..." if self.optional else self.name


def _no_source() -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Definition:
    """What is known of an upstream name. ``parameters`` is None for a name that is no function.

    ``digest`` computes the fingerprint of the source; None where there is no source.
    """

    parameters: tuple[Parameter, ...] | None = None
    digest: Callable[[], str | None] = _no_source


def render(parameters: tuple[Parameter, ...]) -> str:
    """The parameters as source; the inverse of ``parse_signature``."""
    parts: list[str] = []
    star_seen = False
    for parameter in parameters:
        if parameter.kind == "KEYWORD_ONLY" and not star_seen:
            parts.append("*")
        star_seen |= parameter.kind in ("VAR_POSITIONAL", "KEYWORD_ONLY")
        parts.append(str(parameter))
    return f"({', '.join(parts)})"


def parse_signature(text: str) -> tuple[Parameter, ...]:
    """Parameters of a signature written as in source: ``(self, request, *, key=..., **kwargs)``."""
    function = ast.parse(f"def _{text}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return of_node(function)


def of_node(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[Parameter, ...]:
    """Parameters of a function in a syntax tree."""
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    kinds = ["POSITIONAL_ONLY"] * len(args.posonlyargs) + ["POSITIONAL_OR_KEYWORD"] * len(args.args)
    out = [
        Parameter(arg.arg, kind, i >= required)
        for i, (arg, kind) in enumerate(zip(positional, kinds, strict=True))
    ]
    if args.vararg:
        out.append(Parameter(args.vararg.arg, "VAR_POSITIONAL", True))
    pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    out += [Parameter(arg.arg, "KEYWORD_ONLY", default is not None) for arg, default in pairs]
    if args.kwarg:
        out.append(Parameter(args.kwarg.arg, "VAR_KEYWORD", True))
    return tuple(out)


def of_callable(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """Parameters of a live function; decorators that keep ``__wrapped__`` are seen through."""
    return tuple(
        Parameter(
            parameter.name,
            parameter.kind.name,
            parameter.kind.name.startswith("VAR_") or parameter.default is not inspect.Parameter.empty,
        )
        for parameter in inspect.signature(function).parameters.values()
    )


def fingerprint(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Digest of what a function does: comments, layout, annotations and its docstring do not count."""
    bare = copy.deepcopy(function)
    if ast.get_docstring(bare, clean=False) is not None:
        bare.body = bare.body[1:] or [ast.Pass()]
    bare.returns = None
    for node in ast.walk(bare):
        if isinstance(node, ast.arg):
            node.annotation = None
    return hashlib.sha256(ast.unparse(bare).encode()).hexdigest()[:FINGERPRINT_DIGITS]
