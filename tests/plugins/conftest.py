"""Helpers of this folder are imported by their bare names; no test sees what another one asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from penstock.plugins import features, ledger

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch):
    monkeypatch.setattr(ledger, "_entries", {})
    monkeypatch.delenv(features.ASKED_FOR, raising=False)
