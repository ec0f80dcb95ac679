"""Take statistics of ours out of vLLM's before vLLM's loggers see them, and export them.

Why: ``SchedulerStats`` has no field for statistics of a scheduler or a worker that is not vLLM's. The seam
for foreign loggers, the entry points ``vllm.stat_logger_plugins``, sees the same fields only, and a plugin
that is installed there turns statistics on for every server, also for those that it has nothing to do with.

Remove when: ``SchedulerStats`` has an open field, and stat logger plugins can be added by configuration.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from penstock.patches.attribute import AttributePatch

PAYLOAD_KEY = "penstock.clients"
"""Where ``SchedulerStats.kv_connector_stats`` carries them."""


def take_payload(stats: Any) -> dict[str, Any] | None:
    """Remove and return what a scheduler of ours put into a ``SchedulerStats``."""
    carried = getattr(stats, "kv_connector_stats", None)
    if not carried or PAYLOAD_KEY not in carried:
        return None
    rest = {key: value for key, value in carried.items() if key != PAYLOAD_KEY}
    # Where no connector is configured, vLLM takes statistics of one for a fault.
    stats.kv_connector_stats = rest or None
    payload: dict[str, Any] = carried[PAYLOAD_KEY]
    return payload


def _replace(original: Any) -> Any:
    @wraps(original)
    def record(
        self: Any,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> Any:
        payload = take_payload(scheduler_stats)
        if payload is not None:
            # prometheus_client is imported only where vLLM has imported it already.
            if "slo" in payload:
                from penstock.patches.slo_gauges import slo_gauges

                slo_gauges().show(payload["slo"], str(engine_idx or 0))
            elif "clients" in payload:
                from penstock.patches.client_gauges import client_gauges

                client_gauges().show(payload, str(engine_idx or 0))
            if "drafts" in payload:
                from penstock.patches.draft_gauges import draft_gauges

                draft_gauges().show(payload["drafts"], str(engine_idx or 0))
            if "sparse" in payload:
                from penstock.patches.sparse_gauges import sparse_gauges

                sparse_gauges().show(payload["sparse"], str(engine_idx or 0))
            if "shared_prefix" in payload:
                from penstock.patches.shared_prefix_gauges import shared_prefix_gauges

                shared_prefix_gauges().show(payload["shared_prefix"], str(engine_idx or 0))
        return original(
            self, scheduler_stats, iteration_stats, mm_cache_stats=mm_cache_stats, engine_idx=engine_idx
        )

    return record


PATCH = AttributePatch(
    target="vllm.v1.metrics.loggers:StatLoggerManager.record",
    signature="(self, scheduler_stats, iteration_stats, mm_cache_stats=..., engine_idx=...)",
    replace=_replace,
    fingerprints=("da5a5e87acc5",),
    wraps=True,
)
