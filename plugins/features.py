"""Features: what they stand on, and how they are applied whole or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from penstock.patches.attribute import AttributePatch
from penstock.plugins import ledger
from penstock.plugins.importing import after_import
from penstock.plugins.seams import Finding, Seam, State, Tree, Use, check

# Tells processes that this one starts which features were asked for: the configuration of an engine reaches a
# worker too late for patches that decide how the worker lays out its memory.
ASKED_FOR = "PENSTOCK_FEATURES"


class FeatureError(RuntimeError):
    """A feature that was asked for cannot be applied; the message names the seam that moved."""


class EngineMissing(RuntimeError):
    """The engine is not installed in this environment."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The engine that features stand on: its name, its version and its code."""

    engine: str
    version: str
    tree: Tree

    @property
    def logger(self) -> logging.Logger:
        """A child of the engine's logger, so that the engine's own handlers and levels apply."""
        return logging.getLogger(f"{self.engine}.penstock")

    @property
    def name(self) -> str:
        """Engine and version, for messages."""
        return f"{self.engine} {self.version}"


class Hook(Protocol):
    """A change that the engine itself makes, asked for in its own registry; the seam that it stands on is
    declared like any other."""

    def register(self) -> None:
        """Ask for it; a second time without effect."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that a user can turn on: its seams, its hooks where the engine has a registry of them, and
    the patches that stand in where no seam exists."""

    name: str
    summary: str
    seams: tuple[Seam, ...]
    patches: tuple[AttributePatch, ...] = ()
    hooks: tuple[Hook, ...] = ()

    def all_seams(self) -> Iterator[Seam]:
        """The declared seams, then the targets of the patches that this installation needs."""
        yield from self.seams
        for patch in self.patches:
            if patch.needed():
                yield seam_of(patch)


def seam_of(patch: AttributePatch) -> Seam:
    """The seam that a patch stands on."""
    return Seam(patch.target, Use.PATCH, patch.signature, patch.fingerprints, patch.wraps)


def verify(feature: Feature, tree: Tree) -> list[Finding]:
    """Check every seam of a feature; nothing is changed."""
    return [check(seam, tree) for seam in feature.all_seams()]


def apply(feature: Feature, upstream: Upstream) -> bool:
    """Verify a feature, install its patches and register its hooks. False, and nothing happens, where that
    was done before.

    Raises:
        FeatureError: a seam moved; no patch of the feature is installed then.
    """
    if any(entry.feature == feature.name and entry.state == "active" for entry in ledger.entries()):
        return False
    moved = [finding for finding in verify(feature, upstream.tree) if finding.state is State.MOVED]
    if moved:
        reason = "; ".join(map(str, moved))
        _record(feature, upstream, "off", reason)
        raise FeatureError(f"{feature.name} cannot be applied to {upstream.name}: {reason}")
    with _undo_on_error() as installed:
        for patch in feature.patches:
            if patch.needed():
                installed.append(patch)
                after_import(patch.module, patch.install)
    for hook in feature.hooks:
        hook.register()
    _record(feature, upstream, "active")
    return True


@contextmanager
def _undo_on_error() -> Iterator[list[AttributePatch]]:
    installed: list[AttributePatch] = []
    try:
        yield installed
    except AttributeError:
        for patch in reversed(installed):
            patch.remove()
        raise


def require(feature: Feature, upstream: Upstream) -> None:
    """Apply a feature that was asked for, here and in every process that this one starts.

    Raises:
        FeatureError: as ``apply``.
    """
    if apply(feature, upstream):
        upstream.logger.info("penstock: %s is active on %s", feature.name, upstream.name)
    names = asked_for()
    if feature.name not in names:
        os.environ[ASKED_FOR] = ",".join((*names, feature.name))


def offer(feature: Feature, upstream: Upstream) -> bool:
    """Apply a feature that nobody asked for by name; where it cannot be applied it stays off."""
    try:
        apply(feature, upstream)
    except FeatureError as error:
        upstream.logger.warning("penstock: %s; it stays off", error)
        return False
    return True


def asked_for() -> tuple[str, ...]:
    """Names of the features that this process or the one that started it was asked for."""
    return tuple(filter(None, os.environ.get(ASKED_FOR, "").split(",")))


def _record(feature: Feature, upstream: Upstream, state: ledger.FeatureState, reason: str = "") -> None:
    ledger.record(ledger.Entry(feature.name, upstream.engine, upstream.version, state, reason))
