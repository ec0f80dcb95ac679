"""What shared prefixes saved in this worker, for ``/metrics``.

It travels with the outputs of the worker's steps (``patches/vllm/worker_stats.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from penstock.kernels.shared_prefix.stats import SharedPrefixStats

PART = "shared_prefix"
"""Its key in what travels."""

_counted: WeakSet[SharedPrefixStats] = WeakSet()


def count(stats: SharedPrefixStats) -> None:
    """Have ``stats`` travel, for as long as they live."""
    _counted.add(stats)


def collect() -> dict[str, Any] | None:
    """Totals of this process, under their key; None where no prefix is ever shared."""
    snapshots = [stats.snapshot() for stats in _counted]
    if not snapshots:
        return None
    names = snapshots[0].__struct_fields__
    return {PART: {name: sum(getattr(each, name) for each in snapshots) for name in names}}
