"""Fixtures of the proxy's tests; ``scripted_engines`` beside this file is their kit."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted_engines import Site, running_site


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """One server a role."""
    async with running_site() as running:
        yield running
