"""The virtual engine as a fixture module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _load(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"slo_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"slo_{name}"] = module
    spec.loader.exec_module(module)


_load("engine")
_load("instances")
