"""The doctor: what it says of an engine that is fine, one that moved, and none."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import msgspec
import pytest
from click.testing import CliRunner

from penstock.plugins import doctor as command
from penstock.plugins.doctor_report import (
    DecodeReport,
    EngineReport,
    PrefixReport,
    Problem,
    Report,
    TransportReport,
    examine,
)
from penstock.plugins.features import Feature
from penstock.plugins.seams import Seam, Use
from penstock.plugins.trees import SourceTree
from penstock.plugins.vllm.examination import VllmExaminer, declared_layouts, minor_of

WORKING = TransportReport(name="nixl", version="1.5.1", available=True, plugins=("UCX",), devices=("tcp/lo",))

ON_A_GPU = DecodeReport(
    "H200",
    "triton",
    "gives the log-sum-exp",
    {"xqa": "FlashInfer is not installed"},
    PrefixReport("stock", "no backend for CUDA", {"compiled": "it is for CPUs"}),
)


class Examiner:
    """One feature, on a tree of the test's making."""

    def __init__(self, tree, engine):
        self.tree, self.found = tree, engine

    moves_blocks = True

    def feature_names(self):
        return ("taking",)

    def engine(self):
        return self.found

    def features(self):
        return (examine(Feature("taking", "", (Seam("upd:Pool.take", Use.CALL, "(self, n)"),)), self.tree),)

    def layouts(self):
        return ()

    def problems(self, transports, packages):
        for report in self.features():
            for moved in report.moved:
                yield Problem(report.name, moved, "upgrade penstock")


@pytest.fixture
def ask(tmp_path, monkeypatch):
    def ask(source: str, *arguments: str, transport: TransportReport = WORKING):
        (tmp_path / "upd.py").write_text(source)
        engine = EngineReport("engine", "1.0", "engine", True, "1.0 to 1.2")
        monkeypatch.setattr(command, "examiner", lambda _: Examiner(SourceTree(tmp_path), engine))
        monkeypatch.setattr(command, "probe_nixl", lambda timeout_s: transport)
        monkeypatch.setattr(command, "probe_decode", lambda timeout_s: ON_A_GPU)
        return CliRunner().invoke(command.doctor, [*arguments])

    return ask


FINE = "class Pool:\n    def take(self, n): ...\n"
RENAMED = "class Pool:\n    def taken(self, n): ...\n"


def test_fine_engine(ask):
    result = ask(FINE, "--require", "taking")
    assert result.exit_code == 0
    for part in ("engine 1.0", "taking              ready", "UCX", "nothing"):
        assert part in result.output


def test_moved_seam_is_named_with_what_to_do_and_fails_only_if_required(ask):
    result = ask(RENAMED)
    assert result.exit_code == 0
    assert "taking: upd:Pool.take: not found\n    -> upgrade penstock" in result.output
    assert ask(RENAMED, "--require", "taking").exit_code == 1


def test_json_is_the_report(ask):
    report = msgspec.json.decode(ask(RENAMED, "--json").output, type=Report)
    assert [(f.name, f.state, f.moved) for f in report.features] == [
        ("taking", "off", ("upd:Pool.take: not found",))
    ]
    assert report.broken("taking") == list(report.problems)
    assert report.broken("other") == []


def test_verbose_names_every_seam(ask):
    assert "upd:Pool.take (call)" in ask(FINE, "-v").output


def test_the_kernel_for_sparse_decode_is_named_and_the_others_on_request(ask):
    assert "H200                triton   gives the log-sum-exp" in ask(FINE).output
    assert "FlashInfer is not installed" not in ask(FINE).output
    assert "not xqa: FlashInfer is not installed" in ask(FINE, "-v").output


def test_the_kernel_for_shared_prefixes_is_named_and_the_others_on_request(ask):
    assert "H200                stock    no backend for CUDA" in ask(FINE).output
    assert "not compiled: it is for CPUs" in ask(FINE, "-v").output


def test_a_device_probe_that_crashes_is_reported(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text(CRASHING)
    monkeypatch.setattr(command, "DEVICE_PROBE", [sys.executable, str(tmp_path / "broken.py")])
    report = command.probe_decode(timeout_s=20.0)
    assert (report.path, report.reason) == ("unknown", "UCX  ERROR broken fabric")


def test_unknown_feature_is_refused_with_the_known_ones(ask):
    result = ask(FINE, "--require", "talking")
    assert result.exit_code == 2
    assert "given talking, allowed: taking" in result.output


HANGING = "import time\ntime.sleep(600)\n"
CRASHING = "import os, sys\nprint('UCX  ERROR broken fabric', file=sys.stderr, flush=True)\nos.abort()\n"


@pytest.mark.parametrize(
    ("code", "detail"), [(HANGING, "took more than"), (CRASHING, "UCX  ERROR broken fabric")]
)
def test_transport_that_hangs_or_crashes_is_reported(monkeypatch, tmp_path, code, detail):
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.setattr(command, "PROBE", [sys.executable, str(tmp_path / "broken.py")])
    report = command.probe_nixl(timeout_s=2.0)
    assert not report.available
    assert detail in report.detail


def test_without_an_engine_it_says_how_to_install_one(monkeypatch):
    monkeypatch.setattr("penstock.plugins.vllm.examination.installed_version", lambda name: None)
    (problem,) = VllmExaminer(None).problems((), ())
    assert "penstock[vllm]" in problem.fix


def test_layouts_are_read_off_the_source(tmp_path):
    (tmp_path / "upl.py").write_text(
        "class All: ...\n"
        "class One:\n    @classmethod\n    def supported_kv_cache_layouts(cls):\n"
        "        return (KVCacheLayout.LBHNC,)\n"
        "class By:\n    @classmethod\n    def supported_kv_cache_layouts(cls):\n"
        "        if x():\n            return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)\n"
        "        return None\n"
    )
    source = SourceTree(tmp_path)
    assert declared_layouts(source, "upl:All") == ("any",)
    assert declared_layouts(source, "upl:One") == ("LBHNC",)
    assert set(declared_layouts(source, "upl:By")) == {"LBHNC", "BLHNC", "any"}
    assert declared_layouts(source, "upl:Gone") == ()


@pytest.mark.parametrize(
    ("version", "minor"), [("0.32.0", (0, 32)), ("0.30.1+cpu", (0, 30)), ("1.0rc1", (1, 0)), ("dev", (0, 0))]
)
def test_minor_version(version, minor):
    assert minor_of(version) == minor


def test_installed_engine_is_examined_without_being_imported():
    pytest.importorskip("vllm", reason="needs an installed vLLM")
    code = (
        "import sys; from penstock.plugins.doctor import examine_all, examiner\n"
        "import msgspec; report = examine_all(examiner(), probe_timeout_s=0)\n"
        "assert not {'vllm', 'torch'} & set(sys.modules)\n"
        "print(msgspec.json.encode(report).decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    states = {feature["name"]: feature["state"] for feature in json.loads(done.stdout)["features"]}
    assert states["flowkv"] == states["command-line"] == "ready"


def test_the_engine_that_is_installed_is_looked_at_unless_one_is_named(monkeypatch):
    from penstock.plugins.sglang import examination as sglang
    from penstock.plugins.vllm import examination as vllm

    monkeypatch.setattr(sglang, "installed_version", lambda: "0.5.23")
    monkeypatch.setattr(vllm, "installed_version", lambda _: None)
    assert isinstance(command.examiner(), sglang.SglangExaminer)
    assert isinstance(command.examiner("vllm"), vllm.VllmExaminer)
    monkeypatch.setattr(vllm, "installed_version", lambda _: "0.32.0")
    assert isinstance(command.examiner(), vllm.VllmExaminer)
    assert isinstance(command.examiner("sglang"), sglang.SglangExaminer)


def test_a_missing_sglang_and_a_list_of_plugins_without_ours_are_named(monkeypatch):
    from penstock.plugins.sglang import examination

    entry = SimpleNamespace(name="penstock")
    monkeypatch.setattr(examination.metadata, "entry_points", lambda group: [entry])

    def problems() -> list[str]:
        return [problem.what for problem in examination.SglangExaminer(None).problems((), ())]

    monkeypatch.setattr(examination, "installed_version", lambda: None)
    assert problems() == ["SGLang is not installed"]
    monkeypatch.setattr(examination, "installed_version", lambda: "0.5.23")
    monkeypatch.setenv("SGLANG_PLUGINS", "penstock, another")
    assert problems() == []
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    assert problems() == ["SGLANG_PLUGINS=another leaves penstock out"]
