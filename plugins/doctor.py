"""``penstock doctor``: what works with the installed engine, found without starting it."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata

import click
import msgspec

from penstock.plugins.device_probe import Decode
from penstock.plugins.doctor_report import (
    DecodeReport,
    Examiner,
    FeatureReport,
    PackageReport,
    PrefixReport,
    Report,
    TransportReport,
)
from penstock.plugins.transport_probe import Findings

PACKAGES = {"pyzmq": "control channel", "msgspec": "control messages", "xxhash": "digests"}
PROBE_TIMEOUT_S = 60.0

PROBE = [sys.executable, "-m", "penstock.plugins.transport_probe", "UCX"]
DEVICE_PROBE = [sys.executable, "-m", "penstock.plugins.device_probe"]

# By name: nothing imports an adapter, and an engine's adapter is looked at only when it is examined.
EXAMINATIONS = {engine: f"penstock.plugins.{engine}.examination" for engine in ("vllm", "sglang")}


def _version(distribution: str) -> str:
    found = next(iter(metadata.distributions(name=distribution)), None)
    return "" if found is None else found.version


def probe_nixl(timeout_s: float = PROBE_TIMEOUT_S) -> TransportReport:
    """What NIXL can do here, asked in a process that may hang or crash without harm."""
    version = _version("nixl")
    try:
        done = subprocess.run(PROBE, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        detail = f"starting UCX took more than {timeout_s:.0f} s"
        return TransportReport(name="nixl", version=version, available=False, detail=detail)
    if done.returncode != 0:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
        detail = f"the probe ended with {done.returncode}: {last}"
        return TransportReport(name="nixl", version=version, available=False, detail=detail)
    found = msgspec.json.decode(done.stdout, type=Findings)
    return TransportReport(
        name="nixl",
        version=version,
        available="UCX" in found.backends,
        plugins=found.plugins,
        backends=found.backends,
        ucx_version=found.ucx_version,
        devices=found.ucx_devices,
        detail=found.error,
    )


def probe_decode(timeout_s: float = PROBE_TIMEOUT_S) -> DecodeReport | None:
    """What would do sparse decode here, asked in a process that imports torch; None without torch."""
    try:
        done = subprocess.run(DEVICE_PROBE, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return DecodeReport("unknown", "unknown", f"looking for a device took more than {timeout_s:.0f} s")
    if done.returncode != 0:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
        return None if "No module named 'torch'" in last else DecodeReport("unknown", "unknown", last)
    found = msgspec.json.decode(done.stdout, type=Decode)
    choice = found.choice
    name = "no GPU" if found.device is None else found.device.name
    prefix = found.prefix
    shared = PrefixReport(prefix.path or "stock", prefix.reason, prefix.refused)
    return DecodeReport(name, choice.path or "dense", choice.reason, choice.refused, shared)


def examiner(engine: str | None = None) -> Examiner:
    """The examiner of an engine's adapter: of the one that is named, else of the one that is installed;
    vLLM's where both are or none is."""
    if engine is not None:
        return _of(engine)
    installed = (found for found in map(_of, EXAMINATIONS) if found.engine() is not None)
    return next(installed, _of("vllm"))


def _of(engine: str) -> Examiner:
    found: Examiner = importlib.import_module(EXAMINATIONS[engine]).examiner()
    return found


def examine_all(examiner: Examiner, *, probe_timeout_s: float = PROBE_TIMEOUT_S) -> Report:
    """The whole examination; with no time for a probe, transports are left out."""
    packages = tuple(PackageReport(name, purpose, _version(name)) for name, purpose in PACKAGES.items())
    transports = (probe_nixl(probe_timeout_s),) if probe_timeout_s and examiner.moves_blocks else ()
    return Report(
        penstock=_version("penstock"),
        python=platform.python_version(),
        engine=examiner.engine(),
        features=examiner.features(),
        layouts=examiner.layouts(),
        transports=transports,
        packages=packages,
        problems=tuple(examiner.problems(transports, packages)),
        decode=probe_decode(probe_timeout_s) if probe_timeout_s else None,
    )


def render(report: Report, *, verbose: bool) -> Iterator[str]:
    """The report as lines for people."""
    yield f"penstock {report.penstock} on Python {report.python}"
    if (engine := report.engine) is not None:
        tested = f"{'' if engine.supported else 'NOT '}in the tested range, {engine.range}"
        yield f"engine   {engine.name} {engine.version} ({engine.distribution}), {tested}"
    yield "\nfeatures"
    for feature in report.features:
        yield from _feature(feature, verbose=verbose)
    if report.layouts:
        yield "\nKV cache layouts"
    for layout in report.layouts:
        extra = f"; with flowkv also {', '.join(layout.with_flowkv)}" if layout.with_flowkv else ""
        yield f"  {layout.backend:<16}{', '.join(layout.layouts)}{extra}"
    if report.transports:
        yield "\ntransports"
    for transport in report.transports:
        yield from _transport(transport)
    if report.decode is not None:
        yield from _decode(report.decode, verbose=verbose)
    yield "\npackages"
    for package in report.packages:
        yield f"  {package.name:<16}{package.version or 'missing':<12}{package.purpose}"
    yield "\nto do"
    for problem in report.problems:
        about = f"{problem.feature}: " if problem.feature else ""
        yield f"  {about}{problem.what}\n    -> {problem.fix}"
    if not report.problems:
        yield "  nothing"


def _feature(feature: FeatureReport, *, verbose: bool) -> Iterator[str]:
    yield f"  {feature.name:<20}{feature.state:<9}{feature.summary}"
    counts = Counter((seam.name.rpartition(".")[0], seam.state) for seam in feature.seams)
    for (owner, state), count in counts.items():
        if not verbose:
            yield f"    {state:<9}{owner} ({count} name{'s' if count > 1 else ''})"
    for seam in feature.seams:
        if verbose or seam.state != "holds":
            yield f"    {seam.state:<9}{seam.name} ({seam.use}) {seam.reason}".rstrip()
    for patch in feature.patches:
        yield f"    patch    {patch.target}: {patch.state} {patch.reason}".rstrip()


def _decode(decode: DecodeReport, *, verbose: bool) -> Iterator[str]:
    yield "\nkernel for sparse decode, heads of 128 in bfloat16, pages of 16 (never run on a GPU so far)"
    yield f"  {decode.device:<20}{decode.path:<9}{decode.reason}"
    if verbose:
        yield from (f"    not {path}: {reason}" for path, reason in decode.refused.items())
    if (prefix := decode.prefix) is not None:
        yield "\nkernel for shared prefixes"
        yield f"  {decode.device:<20}{prefix.path:<9}{prefix.reason}"
        if verbose:
            yield from (f"    not {path}: {reason}" for path, reason in prefix.refused.items())


def _transport(transport: TransportReport) -> Iterator[str]:
    state = "available" if transport.available else "MISSING"
    yield f"  {transport.name} {transport.version:<11}{state} {transport.detail}".rstrip()
    if transport.plugins:
        yield f"    plugins  {', '.join(transport.plugins)}"
    if transport.ucx_version:
        yield f"    UCX {transport.ucx_version}: {', '.join(transport.devices)}"


@click.command()
@click.option(
    "--engine",
    type=click.Choice([*EXAMINATIONS]),
    help="The engine to look at.  [default: the one that is installed, vLLM where both are]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--require", multiple=True, metavar="FEATURE", help="Exit with 1 if this feature cannot work.")
@click.option("-v", "--verbose", is_flag=True, help="Name every seam.")
@click.option(
    "--probe-timeout",
    default=PROBE_TIMEOUT_S,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds that starting the transports, or finding a GPU, may take; 0 leaves them out.",
)
def doctor(
    *, engine: str | None, as_json: bool, require: tuple[str, ...], verbose: bool, probe_timeout: float
) -> None:
    """Say what works with the installed engine, without starting it, and what to do about what does not.

    Exit code: 0; 1 if a feature named by --require cannot work.
    """
    adapter = examiner(engine)
    unknown = [name for name in require if name not in adapter.feature_names()]
    if unknown:
        known = ", ".join(adapter.feature_names())
        raise click.BadParameter(f"given {unknown[0]}, allowed: {known}", param_hint="--require")
    report = examine_all(adapter, probe_timeout_s=probe_timeout)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        click.echo("\n".join(render(report, verbose=verbose)))
    broken = [problem for name in require for problem in report.broken(name)]
    if broken:
        click.echo(f"penstock doctor: {broken[0].what}", err=True)
        raise SystemExit(1)
