"""What holds for all tests that start no engine.

Triton interprets its kernels on the CPU unless a run says otherwise; it looks once, when it is imported.
Examples of a property have no deadline: how long one takes says more of the machine than of the code.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile(
    "no deadline", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("no deadline")
