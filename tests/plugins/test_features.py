"""Features: applied whole or not at all, loudly off when a seam moved, fatal only when asked for."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from penstock.patches.attribute import AttributePatch
from penstock.plugins import features, ledger
from penstock.plugins.features import Feature, FeatureError, Upstream, apply, offer, require
from penstock.plugins.seams import Seam, Use
from penstock.plugins.trees import LiveTree, SourceTree

UPSTREAM = """
class Pool:
    def take(self, count):
        return "stock"
    def give(self, count):
        return "stock"
    def watch(self):
        return "stock"
"""


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    (tmp_path / "upfeat.py").write_text(UPSTREAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ledger, "_entries", {})
    monkeypatch.setattr(ledger, "_published", True)
    monkeypatch.setattr(ledger, "_gauge", None)
    monkeypatch.delenv(features.ASKED_FOR, raising=False)
    importlib.invalidate_caches()
    importlib.import_module("upfeat")
    yield Upstream("engine", "1.2", LiveTree(SourceTree(tmp_path)))
    sys.modules.pop("upfeat", None)


def patch(name, **options):
    def replace(original):
        return lambda self, count: "ours, not " + original(self, count)

    return AttributePatch(f"upfeat:Pool.{name}", "(self, count)", replace, **options)


def feature(name, *patches, seams=()):
    return Feature(name, "", tuple(seams), patches)


def pool():
    return sys.modules["upfeat"].Pool


def states():
    return {entry.feature: entry.state for entry in ledger.entries()}


def test_applied_twice_is_applied_once_and_removal_restores(upstream):
    before = dict(vars(pool()))
    taking = feature("taking", patch("take"))
    apply(taking, upstream)
    apply(taking, upstream)
    patch("take").install()  # a copy of the patch, as in a module that was loaded again
    assert pool()().take(1) == "ours, not stock"
    assert states() == {"taking": "active"}
    taking.patches[0].remove()
    taking.patches[0].remove()
    assert dict(vars(pool())) == before


def test_one_renamed_symbol_turns_exactly_one_feature_off(upstream, monkeypatch, caplog):
    pool().taken = pool().take
    del pool().take
    taking = feature("taking", patch("give"), patch("take"))
    giving = feature("giving", patch("give"), seams=[Seam("upfeat:Pool.watch", Use.CALL, "(self)")])
    assert [offer(taking, upstream), offer(giving, upstream)] == [False, True]
    assert states() == {"taking": "off", "giving": "active"}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "penstock: taking cannot be applied to engine 1.2: upfeat:Pool.take: not found; it stays off"
    ]


def test_seams_are_verified_before_anything_is_changed(upstream):
    moved = Seam("upfeat:Pool.watch", Use.OVERRIDE, "(self, seconds)")
    with pytest.raises(FeatureError) as caught:
        apply(feature("taking", patch("take"), seams=[moved]), upstream)
    assert pool()().take(1) == "stock"
    assert str(caught.value) == (
        "taking cannot be applied to engine 1.2: upfeat:Pool.watch: expected (self, seconds), found (self)"
    )


def test_unknown_source_stops_a_replacement_and_not_a_wrapper(upstream):
    with pytest.raises(FeatureError, match="source has fingerprint"):
        apply(feature("taking", patch("take", fingerprints=("0" * 12,))), upstream)
    apply(feature("giving", patch("give", fingerprints=("0" * 12,), wraps=True)), upstream)
    assert states() == {"taking": "off", "giving": "active"}


def test_what_is_not_needed_is_neither_checked_nor_applied(upstream):
    del pool().take
    apply(feature("taking", patch("take", needed=lambda: False)), upstream)
    assert not hasattr(pool(), "take")


def test_patch_waits_for_a_module_that_is_not_loaded(upstream):
    stock = sys.modules.pop("upfeat")
    apply(feature("taking", patch("take")), upstream)
    assert "upfeat" not in sys.modules
    assert importlib.import_module("upfeat").Pool().take(1) == "ours, not stock"
    assert stock.Pool().take(1) == "stock"


def test_only_what_is_asked_for_reaches_processes_started_later(upstream, caplog):
    caplog.set_level("INFO")
    offer(feature("giving", patch("give")), upstream)
    require(feature("taking", patch("take")), upstream)
    require(feature("watching"), upstream)
    require(feature("taking", patch("take")), upstream)
    assert features.asked_for() == ("taking", "watching")
    assert os.environ[features.ASKED_FOR] == "taking,watching"
    assert [record.getMessage() for record in caplog.records] == [
        "penstock: taking is active on engine 1.2",
        "penstock: watching is active on engine 1.2",
    ]


METRIC = """
import os, sys
from penstock.plugins import ledger
ledger.record(ledger.Entry("one", "vllm", "0.32.0", "off", "moved"))
assert "prometheus_client" not in sys.modules
import prometheus_client
ledger.record(ledger.Entry("one", "vllm", "0.32.0", "active"))
ledger.record(ledger.Entry("two", "vllm", "0.32.0", "off", "moved"))
registry = prometheus_client.REGISTRY
if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    from prometheus_client import multiprocess
    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
print(prometheus_client.generate_latest(registry).decode())
"""


@pytest.mark.parametrize("multiprocess", [False, True])
def test_metric_shows_each_feature_without_importing_its_client_early(tmp_path, multiprocess):
    variables = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    if multiprocess:
        variables["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", METRIC]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout
    rows = {}
    for line in shown.splitlines():
        if line.startswith("penstock_feature_info{"):
            labels, _, value = line.rpartition(" ")
            parts = dict(pair.split("=") for pair in labels.partition("{")[2].rstrip("}").split(","))
            assert (parts["engine"], parts["upstream"]) == ('"vllm"', '"0.32.0"')
            rows[parts["feature"].strip('"'), parts["state"].strip('"')] = float(value)
    assert rows == {("one", "off"): 0, ("one", "active"): 1, ("two", "off"): 1}
