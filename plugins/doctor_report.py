"""What the doctor found, as data: the same structure for people, for JSON and for tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

from penstock.plugins.features import Feature, seam_of
from penstock.plugins.seams import Finding, State, Tree, check


class SeamReport(msgspec.Struct, frozen=True):
    """One seam, how it is used, and whether it holds."""

    name: str
    use: str
    state: str
    reason: str = ""


class PatchReport(msgspec.Struct, frozen=True):
    """One patch: ``unneeded`` here, or the state of the source that it changes."""

    target: str
    state: str
    reason: str = ""


class FeatureReport(msgspec.Struct, frozen=True):
    """One feature: ``ready``, ``drifted`` (works, on upstream source that was not tested) or ``off``."""

    name: str
    summary: str
    state: str
    seams: tuple[SeamReport, ...]
    patches: tuple[PatchReport, ...]

    @property
    def moved(self) -> tuple[str, ...]:
        """The seams and patches that keep the feature off, with reasons."""
        rows = [(seam.name, seam.state, seam.reason) for seam in self.seams]
        rows += [(patch.target, patch.state, patch.reason) for patch in self.patches]
        return tuple(f"{name}: {reason}" for name, state, reason in rows if state == State.MOVED.value)


class EngineReport(msgspec.Struct, frozen=True):
    """The engine found in this environment."""

    name: str
    version: str
    distribution: str
    supported: bool
    range: str


class LayoutReport(msgspec.Struct, frozen=True):
    """KV cache layouts that an attention backend declares; ``any`` where it restricts none."""

    backend: str
    layouts: tuple[str, ...]
    with_flowkv: tuple[str, ...] = ()


class TransportReport(msgspec.Struct, frozen=True, kw_only=True):
    """One byte mover and what it found on this machine."""

    name: str
    version: str = ""
    available: bool
    plugins: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    ucx_version: str = ""
    devices: tuple[str, ...] = ()
    detail: str = ""


class PackageReport(msgspec.Struct, frozen=True):
    """A package that a feature needs; ``version`` is empty where it is missing."""

    name: str
    purpose: str
    version: str


class PrefixReport(msgspec.Struct, frozen=True):
    """What kernel reads a shared prefix once: the ``path`` (``stock`` for none), why, and why not the
    others."""

    path: str
    reason: str
    refused: dict[str, str] = {}


class DecodeReport(msgspec.Struct, frozen=True):
    """What kernel does sparse decode: the ``device``, ``path`` (``dense`` for none), why, and why not the
    others; and which one reads shared prefixes once there."""

    device: str
    path: str
    reason: str
    refused: dict[str, str] = {}
    prefix: PrefixReport | None = None


class Problem(msgspec.Struct, frozen=True):
    """What is missing, for which feature (empty: for all), and what to do about it."""

    feature: str
    what: str
    fix: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that ``penstock doctor`` says."""

    penstock: str
    python: str
    engine: EngineReport | None
    features: tuple[FeatureReport, ...]
    layouts: tuple[LayoutReport, ...]
    transports: tuple[TransportReport, ...]
    packages: tuple[PackageReport, ...]
    problems: tuple[Problem, ...]
    decode: DecodeReport | None = None

    def broken(self, feature: str) -> list[Problem]:
        """The problems that keep a feature from working."""
        return [problem for problem in self.problems if problem.feature in ("", feature)]


class Examiner(Protocol):
    """What an engine's adapter tells the doctor."""

    @property
    def moves_blocks(self) -> bool:
        """Whether a feature for this engine needs a transport."""
        ...

    def feature_names(self) -> tuple[str, ...]:
        """The features for this engine."""
        ...

    def engine(self) -> EngineReport | None:
        """The installed engine, or None."""
        ...

    def features(self) -> tuple[FeatureReport, ...]:
        """Every feature against the installed source."""
        ...

    def layouts(self) -> tuple[LayoutReport, ...]:
        """What the attention backends of this build declare."""
        ...

    def problems(
        self, transports: tuple[TransportReport, ...], packages: tuple[PackageReport, ...]
    ) -> Iterator[Problem]:
        """What stands in the way, and what to do about it."""
        ...


def examine(feature: Feature, tree: Tree) -> FeatureReport:
    """Check a feature against a tree; nothing is applied."""
    seams = tuple(_seam(check(seam, tree)) for seam in feature.seams)
    patches = []
    for patch in feature.patches:
        if not patch.needed():
            patches.append(PatchReport(patch.target, "unneeded"))
            continue
        finding = check(seam_of(patch), tree)
        patches.append(PatchReport(patch.target, finding.state.value, finding.reason))
    states = {seam.state for seam in seams} | {patch.state for patch in patches}
    state = "off" if State.MOVED.value in states else "drifted" if State.DRIFTED.value in states else "ready"
    return FeatureReport(feature.name, feature.summary, state, seams, tuple(patches))


def transport_problems(transports: tuple[TransportReport, ...]) -> Iterator[Problem]:
    """The byte movers that do not work here."""
    for transport in transports:
        if not transport.available:
            fix = "see the NIXL and UCX logs" if transport.version else "pip install 'penstock[nixl]'"
            yield Problem("flowkv", f"{transport.name}: {transport.detail}", fix)


def _seam(finding: Finding) -> SeamReport:
    return SeamReport(finding.seam.name, finding.seam.use.value, finding.state.value, finding.reason)
