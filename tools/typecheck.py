"""Strict type check of the rooms that import each other as ``penstock.<room>``.

The distribution maps ``penstock.schedulers`` to the folder ``schedulers``. mypy finds packages by folder name
only, so it is shown a tree of links in which the folders stand where their import names say.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = ROOT / ".cache" / "typecheck"
ROOMS = ("schedulers", "connectors", "kernels", "routers", "plugins", "patches", "benchmarks", "simulation")


def link_rooms() -> None:
    """Make the links that are missing; those that stand stay, since another run may be using them."""
    package = LINKS / "penstock"
    package.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        with contextlib.suppress(FileExistsError):
            (package / room).symlink_to(ROOT / room, target_is_directory=True)


def main() -> int:
    """Run mypy with the project's settings; returns its exit status."""
    link_rooms()
    packages = [argument for room in ROOMS for argument in ("-p", f"penstock.{room}")]
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *settings, *packages]
    environment = {**os.environ, "MYPYPATH": str(LINKS)}
    return subprocess.run(command, check=False, cwd=LINKS, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
