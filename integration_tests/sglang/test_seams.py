"""The installed SGLang has what the features stand on, and loading the plugin changes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from penstock.benchmarks.servers import console_script
from penstock.plugins.doctor_report import examine
from penstock.plugins.sglang.features import FEATURES
from penstock.plugins.sglang.installation import upstream
from penstock.plugins.signatures import Definition

GENEROUS_MS = 20
SEAMS = sorted({seam.name for feature in FEATURES.values() for seam in feature.seams})


class Renamed:
    """SGLang's source in which one name is gone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def lookup(self, module: str, path: tuple[str, ...]) -> Definition | None:
        gone = f"{module}:{'.'.join(path)}" == self.name
        return None if gone else upstream().tree.lookup(module, path)


def test_every_seam_holds():
    reports = [examine(feature, upstream().tree) for feature in FEATURES.values()]
    assert {report.name: report.state for report in reports} == dict.fromkeys(FEATURES, "ready")


@pytest.mark.parametrize("name", SEAMS)
def test_a_name_that_is_gone_turns_off_the_features_that_declare_it(name: str):
    declaring = {f.name for f in FEATURES.values() if name in {seam.name for seam in f.seams}}
    off = {f.name for f in FEATURES.values() if examine(f, Renamed(name)).state == "off"}
    assert off == declaring


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**kept, **variables},
        timeout=300,
        check=False,
    )


# A child is told apart from the process that a user starts by having a parent in multiprocessing.
CHILD = "import multiprocessing\nmultiprocessing.parent_process = lambda: True\n"
COST = """
import json, sys, time
from importlib.metadata import entry_points
(point,) = entry_points(group="sglang.srt.plugins", name="penstock")
before, start = set(sys.modules), time.process_time()
point.load()()
spent_ms = (time.process_time() - start) * 1000
new = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(json.dumps({"spent_ms": spent_ms, "new": sorted(new)}))
"""
HOOKED = """
import json
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
# Packages that SGLang needs are plugins as well.
ours = [
    target for target, hooks in HookRegistry._hooks.items()
    if target in HookRegistry._patched and any(source.plugin_name == "penstock" for _, _, source in hooks)
]
print(json.dumps([target.rpartition(".")[2] for target in sorted(ours)]))
"""
ASKED = json.dumps({"scheduler": {"policy": "dlpm"}})


def found_by(code: str, **variables: str) -> Any:
    done = run(code, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_with_nothing_asked_for_only_the_options_are_added_and_a_child_is_left_alone():
    assert found_by(HOOKED) == ["add_cli_args", "from_cli_args"]
    assert found_by(CHILD + HOOKED) == []
    child = found_by(CHILD + COST)
    assert child["new"] == ["penstock"]
    assert child["spent_ms"] < GENEROUS_MS


EVERY_POLICY = [
    "_get_decode_retraction_order",
    "get_prefill_adder_class",
    "init_schedule_policy",
    "on_idle",
    "process_batch_result",
    "set_internal_state",
    "verify",
]
DECODE = ["_update_handshake_waiters", "get_new_prebuilt_batch", "resume_retracted_reqs"]
SLO = ["_get_new_batch_prefill_raw", "run_batch"]
SPARSE = ["alloc", "alloc_decode", "alloc_extend", "on_idle", "process_batch_result", "resolve_once"]


@pytest.mark.parametrize(
    ("asked", "first", "child"),
    [
        ({"scheduler": {"policy": "dlpm"}}, EVERY_POLICY + DECODE, EVERY_POLICY + DECODE),
        (
            {"scheduler": {"policy": "slo", "trust_headers": True}},
            [*EVERY_POLICY, *SLO, "launch_server"],
            EVERY_POLICY + SLO,
        ),
        ({"sparse_attention": {}}, SPARSE, SPARSE),
        (
            {"scheduler": {"policy": "dlpm"}, "sparse_attention": {}},
            sorted({*SPARSE, *EVERY_POLICY, *DECODE}),
            sorted({*SPARSE, *EVERY_POLICY, *DECODE}),
        ),
    ],
    ids=["dlpm", "slo, headers", "sparse attention", "dlpm and sparse attention"],
)
def test_what_the_variable_asks_for_is_hooked_and_nothing_else(asked, first, child):
    """``first`` is the process that a user starts, which serves HTTP, ``child`` one of an engine's."""
    config = json.dumps(asked)
    options = ["add_cli_args", "from_cli_args"]
    assert sorted(found_by(CHILD + HOOKED, PENSTOCK_CONFIG=config)) == sorted(child)
    assert sorted(found_by(HOOKED, PENSTOCK_CONFIG=config)) == sorted([*first, *options])


MEMBER = """
from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class
assert TransferBackend("flowkv") in list(TransferBackend)
assert TransferBackend("nixl") is TransferBackend.NIXL
assert get_kv_class(TransferBackend.FAKE, KVClassType.SENDER).__module__.startswith("sglang.")
"""


def test_flowkv_is_a_transfer_backend_in_a_child_beside_those_of_stock():
    wanted = [
        "get_kv_class",
        "get_kv_pool_cls",
        "get_paged_allocator_cls",
        "init_metrics_collector",
        "resolve_once",
    ]
    done = run(CHILD + HOOKED + MEMBER, PENSTOCK_CONFIG='{"flowkv": {}}')
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout.splitlines()[-1])) == wanted


ALGORITHM = """
from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
assert NgramCorpus.__module__.startswith("penstock.")
assert SpeculativeAlgorithm.from_string("suffix").is_ngram()
assert SpeculativeAlgorithm.from_string("NGRAM") is SpeculativeAlgorithm.NGRAM
"""


def test_suffix_is_an_algorithm_in_a_child_beside_those_of_stock():
    done = run(CHILD + HOOKED + ALGORITHM, PENSTOCK_CONFIG='{"suffix": {}}')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["update_spec_metrics", "NgramCorpus"]


REFUSED = """
from penstock.plugins import seams
from penstock.plugins.sglang import features
seams_of = (seams.Seam("sglang.srt.managers.scheduler:Scheduler.gone", seams.Use.READ),)
object.__setattr__(features.REQUEST_SCHEDULER, "seams", seams_of)
from sglang.srt.plugins import load_plugins
load_plugins()
print("went on")
"""


@pytest.mark.parametrize(
    ("config", "reason"),
    [(ASKED, "Scheduler.gone: not found"), ('{"scheduler": {"policy": "lpm"}}', "given 'lpm'")],
)
def test_what_cannot_be_applied_ends_the_process_with_one_line(config: str, reason: str):
    done = run(REFUSED, PENSTOCK_CONFIG=config)
    assert done.returncode == 2
    assert "went on" not in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("penstock:")]
    assert reason in line


def test_the_doctor_finds_nothing_to_do():
    done = subprocess.run(
        [
            console_script("penstock"),
            "doctor",
            "--engine",
            "sglang",
            "--json",
            "--require",
            "request-scheduler",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["engine"]["name"] == "sglang"
    assert report["engine"]["supported"]
    assert report["problems"] == []
