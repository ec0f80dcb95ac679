"""The doctor's examination of an installed SGLang: its source is read, nothing of it is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from penstock.plugins.doctor_report import (
    EngineReport,
    FeatureReport,
    LayoutReport,
    PackageReport,
    Problem,
    TransportReport,
    examine,
    transport_problems,
)
from penstock.plugins.sglang.features import FEATURES
from penstock.plugins.sglang.installation import DISTRIBUTION, installed_version
from penstock.plugins.trees import LiveTree, SourceTree, installed_tree

TESTED = ("0.5.22", "0.5.23")
GROUP = "sglang.srt.plugins"


@dataclass(frozen=True, slots=True)
class SglangExaminer:
    """Reads SGLang's source: the installed one, or an unpacked wheel's."""

    source: SourceTree | None

    @property
    def moves_blocks(self) -> bool:
        """FlowKV does."""
        return True

    def feature_names(self) -> tuple[str, ...]:
        """The features for SGLang."""
        return tuple(FEATURES)

    def engine(self) -> EngineReport | None:
        """The installed SGLang, or None."""
        version = installed_version()
        if version is None:
            return None
        return EngineReport("sglang", version, DISTRIBUTION, version in TESTED, ", ".join(TESTED))

    def features(self) -> tuple[FeatureReport, ...]:
        """Every feature against the source."""
        if self.source is None:
            return ()
        tree = LiveTree(self.source)
        return tuple(examine(feature, tree) for feature in FEATURES.values())

    def layouts(self) -> tuple[LayoutReport, ...]:
        """SGLang's backends take one layout; the torch backend also one that holds all layers together."""
        return (
            LayoutReport("torch_native", ("layers",), ("tokens",)),
            LayoutReport("others", ("layers",)),
        )

    def problems(
        self, transports: tuple[TransportReport, ...], packages: tuple[PackageReport, ...]
    ) -> Iterator[Problem]:
        """What stands in the way, and what to do about it."""
        engine = self.engine()
        if engine is None:
            yield Problem("", "SGLang is not installed", "pip install 'penstock[sglang]'")
            return
        if "penstock" not in {entry.name for entry in metadata.entry_points(group=GROUP)}:
            yield Problem(
                "", f"no entry point in {GROUP}", "pip install penstock in the engine's environment"
            )
        allowed = os.environ.get("SGLANG_PLUGINS")
        if allowed and "penstock" not in {name.strip() for name in allowed.split(",")}:
            yield Problem(
                "", f"SGLANG_PLUGINS={allowed} leaves penstock out", "add penstock to SGLANG_PLUGINS"
            )
        fix = "upgrade penstock, or report this" if engine.supported else f"use SGLang {engine.range}"
        for report in self.features():
            yield from (Problem(report.name, moved, fix) for moved in report.moved)
        yield from transport_problems(transports)


def examiner() -> SglangExaminer:
    """For the SGLang of this environment."""
    return SglangExaminer(installed_tree("sglang"))
