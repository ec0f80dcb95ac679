"""Direction of imports between the rooms: cores know no engine, adapters know one, nobody imports an adapter.

Reads the syntax trees only, so an import inside a function or under ``TYPE_CHECKING`` counts like any other.

    python tools/check_imports.py [ROOT]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOMS = ("benchmarks", "connectors", "kernels", "patches", "plugins", "routers", "schedulers", "simulation")
CORES = frozenset({"schedulers", "connectors"})
ENGINES = frozenset({"vllm", "sglang"})

# A module that only these files may import, whatever their room allows; benchmarks are free.
ONE_FILE = {
    "nixl": "connectors/transports/nixl.py",
    "nixl_cu12": "connectors/transports/nixl.py",
    "zmq": "connectors/control.py",
}

# The command line offers the demo and the benches.
COMMANDS = frozenset({"plugins/cli.py"})


@dataclass(frozen=True, slots=True)
class Room:
    """What the files of one room may import besides the standard library and the room itself.

    ``packages`` None means any package that is no engine; ``rooms`` are other rooms of this distribution.
    """

    rooms: frozenset[str] = frozenset()
    packages: frozenset[str] | None = None


RULES = {
    "schedulers": Room(packages=frozenset({"numpy", "msgspec", "sortedcontainers"})),
    "connectors": Room(packages=frozenset({"numpy", "msgspec", "sortedcontainers", "xxhash", *ONE_FILE})),
    "kernels": Room(
        packages=frozenset({"numpy", "msgspec", "torch", "triton", "flashinfer", "numba", "llvmlite"})
    ),
    "routers": Room(rooms=CORES),
    "simulation": Room(rooms=CORES),
    "patches": Room(rooms=CORES | {"kernels"}),
    "plugins": Room(rooms=frozenset(ROOMS) - {"benchmarks"}),
    "benchmarks": Room(rooms=frozenset(ROOMS)),
}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, as an absolute dotted name."""

    line: int
    module: str

    @property
    def top(self) -> str:
        """The first part of the name."""
        return self.module.partition(".")[0]


def imports_of(source: str, package: tuple[str, ...]) -> Iterator[Import]:
    """All imports of a module that lies in ``package``, for example ``("penstock", "routers")``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, f"{module}.{alias.name}")


def engine_of(path: PurePosixPath) -> str | None:
    """The one engine that a file may know, if any."""
    room, *rest = path.parts
    if room in ("plugins", "patches") and len(rest) > 1 and rest[0] in ENGINES:
        return rest[0]
    if room == "simulation":
        return next((engine for engine in ENGINES if engine in rest), None) or next(
            (engine for engine in ENGINES if path.stem in (engine, f"{engine}_engine")), None
        )
    return None


def fault(path: PurePosixPath, found: Import) -> str | None:
    """Why ``path`` may not import ``found``, or None if it may."""
    if found.top in ROOMS:
        return f"{found.top!r} is a bare name that belongs to others: import penstock.{found.top}"
    if path.parts[0] not in RULES or found.top in sys.stdlib_module_names:
        return None
    return _fault_inside(path, found) if found.top == "penstock" else _fault_outside(path, found)


def _fault_outside(path: PurePosixPath, found: Import) -> str | None:
    """Rules for other people's packages."""
    room = path.parts[0]
    if room == "benchmarks":
        return None
    if found.top in ENGINES:
        engine = engine_of(path)
        return None if found.top == engine else f"imports {found.top}; allowed here: {engine or 'no engine'}"
    if found.top in ONE_FILE and str(path) != ONE_FILE[found.top]:
        return f"only {ONE_FILE[found.top]} may import {found.top}"
    packages = RULES[room].packages
    if packages is not None and found.top not in packages:
        return f"{room} may import {', '.join(sorted(packages))}, not {found.top}"
    return None


def _fault_inside(path: PurePosixPath, found: Import) -> str | None:
    """Rules between the rooms of this distribution."""
    room = path.parts[0]
    target = found.module.split(".")[1:]
    if target[:1] == ["benchmarks"] and str(path) in COMMANDS:
        return None
    if target and target[0] not in {room, *RULES[room].rooms}:
        return f"{room} may not import {target[0]}"
    adapter = target[1] if len(target) > 1 and target[0] == "plugins" and target[1] in ENGINES else None
    if adapter and room != "benchmarks" and path.parts[:2] != ("plugins", adapter):
        return f"nothing imports an adapter: penstock.plugins.{adapter}"
    return None


def check(root: Path, folders: Iterable[str] = (*ROOMS, "tests", "integration_tests")) -> list[str]:
    """One line ``file:line: reason`` for each import that goes the wrong way."""
    faults = []
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            path = PurePosixPath(file.relative_to(root).as_posix())
            package = ("penstock", *path.parent.parts)
            for found in imports_of(file.read_text(encoding="utf-8"), package):
                if reason := fault(path, found):
                    faults.append(f"{path}:{found.line}: {reason}")
    return faults


def main() -> int:
    """Command line; returns 1 if anything goes the wrong way."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    faults = check(root)
    for line in faults:
        print(line)
    print(
        f"imports: {len(faults)} in the wrong direction" if faults else "imports: all in the right direction"
    )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
