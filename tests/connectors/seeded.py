"""How property tests run here: the same examples every time, and no clock decides."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

seeded = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
