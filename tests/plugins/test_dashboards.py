"""The dashboards query exactly the series that the code exports."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from penstock import patches
from penstock.plugins import dashboards, ledger
from penstock.plugins.sglang.transfer_series import declared as declared_on_sglang
from penstock.plugins.vllm.transfer_stats import FlowKVPromMetrics
from penstock.routers.metrics import Metrics

FOLDER = Path(dashboards.__path__[0])
FILES = sorted(FOLDER.glob("*.json"))
OURS = re.compile(r"\b(?:penstock_|vllm:flowkv_|sglang:flowkv_)\w+")
EITHER = re.compile(r"\((\w+)\|(\w+)\)(:\w+)")
"""Series that two engines have, each under its own name."""
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "gauge": ("",),
}


def families(registry: Any) -> dict[str, set[str]]:
    """The series that Prometheus stores of each metric of a registry, whether it has samples or not."""
    return {
        family.name: {family.name + suffix for suffix in SUFFIXES[family.type]}
        for family in registry.collect()
        if OURS.match(family.name)
    }


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """What the proxy, both engines' transfers, the ledger and the gauges of the front end declare."""
    own = CollectorRegistry()
    kinds = {kind: partial(kind, registry=own) for kind in (Gauge, Counter, Histogram)}
    FlowKVPromMetrics(
        SimpleNamespace(kv_transfer_config=None), kinds, ["model_name", "engine"], {0: ["m", "0"]}
    )
    declared_on_sglang(("model_name", "tp_rank"))
    published_here = ledger._gauge is None
    if published_here:
        ledger._publish_all()
    for module in pkgutil.walk_packages(patches.__path__, "penstock.patches."):
        if module.name.endswith("_gauges"):
            found = importlib.import_module(module.name)
            for make in vars(found).values():
                if hasattr(make, "cache_info") and make.__module__ == found.__name__:
                    make()
    declared = families(Metrics([]).registry) | families(own) | families(REGISTRY)
    if published_here:
        REGISTRY.unregister(ledger._gauge)
        ledger._gauge = None
    return declared


def expressions(file: Path) -> list[str]:
    board = json.loads(file.read_text())
    anchors = [variable["query"] for variable in board["templating"]["list"]]
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]] + anchors
    return [EITHER.sub(r"\1\3|\2\3", expression) for expression in found]


def queried(file: Path) -> set[str]:
    return {name for expression in expressions(file) for name in OURS.findall(expression)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_series_that_is_queried_is_exported(file, exported):
    assert queried(file) <= set().union(*exported.values())


def test_every_metric_that_is_exported_is_on_a_dashboard(exported):
    shown = set().union(*map(queried, FILES))
    assert {name for name, series in exported.items() if not series & shown} == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_dashboard_is_one_that_grafana_can_show(file):
    board = json.loads(file.read_text())
    assert board["uid"] == f"penstock-{file.stem}"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(board["panels"])
    for expression in expressions(file):
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")


def test_the_files_are_what_the_tool_writes():
    tool = Path(__file__).parents[2] / "tools" / "make_dashboards.py"
    checked = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
