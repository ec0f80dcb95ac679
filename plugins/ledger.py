"""What is active in this process: a table and a metric."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from penstock.plugins.importing import after_import

FeatureState = Literal["active", "off"]

METRIC = "penstock_feature_info"
LABELS = ("feature", "engine", "state", "upstream")


@dataclass(frozen=True, slots=True)
class Entry:
    """The state of one feature in this process; ``reason`` says why it is off."""

    feature: str
    engine: str
    upstream: str
    state: FeatureState
    reason: str = ""


_entries: dict[str, Entry] = {}
_gauge: Any = None
_published = False


def record(entry: Entry) -> None:
    """Note the state of a feature, replacing what was noted of it before."""
    global _published  # noqa: PLW0603 - the registry of prometheus_client is one per process as well
    previous = _entries.get(entry.feature)
    if previous == entry:
        return
    _entries[entry.feature] = entry
    if not _published:
        _published = True
        after_import("prometheus_client", _publish_all)
    elif _gauge is not None:
        _publish(entry, previous)


def entries() -> tuple[Entry, ...]:
    """Everything recorded in this process, in order of first record."""
    return tuple(_entries.values())


def _publish_all() -> None:
    # The engine imports prometheus_client once its multi-process directory is set; importing it here would
    # fix the kind of its values too early.
    global _gauge  # noqa: PLW0603
    client = sys.modules["prometheus_client"]
    help_text = "State of a Penstock feature in this process (1 = this row holds)."
    _gauge = client.Gauge(METRIC, help_text, LABELS, multiprocess_mode="livemax")
    for entry in _entries.values():
        _publish(entry, None)


def _publish(entry: Entry, previous: Entry | None) -> None:
    if previous is not None:
        _gauge.labels(previous.feature, previous.engine, previous.state, previous.upstream).set(0)
    _gauge.labels(entry.feature, entry.engine, entry.state, entry.upstream).set(1)
