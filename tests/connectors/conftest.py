"""Fixtures of the connectors' tests; ``two_engines`` beside this file is their kit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from control_kit import client_of, raw, serve
from two_engines import Site

__all__ = ["client_of", "raw", "serve", "site"]


@pytest.fixture
def site() -> Site:
    """A prefill and a decode engine, healthy, with one rank each."""
    return Site()
