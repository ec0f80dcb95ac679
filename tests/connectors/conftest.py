"""Fixtures of the connectors' tests; ``two_engines`` beside this file is their kit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from two_engines import Site

settings.register_profile("connectors", deadline=None, derandomize=True, max_examples=150)


@pytest.fixture(autouse=True)
def _profile() -> None:
    settings.load_profile("connectors")


@pytest.fixture
def site() -> Site:
    """A prefill and a decode engine, healthy, with one rank each."""
    return Site()
