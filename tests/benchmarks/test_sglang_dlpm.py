"""``penstock bench sglang-dlpm``: which runs it makes, and what it says where SGLang is missing."""

from __future__ import annotations

from collections import Counter

from click.testing import CliRunner

from penstock.benchmarks import sglang_dlpm
from penstock.benchmarks.dlpm_cases import cases
from penstock.benchmarks.dlpm_claims import AGAIN
from penstock.benchmarks.sglang_dlpm import POLICIES, QUICK_CASES, bench, plan
from penstock.simulation.step_time import load_step_time


def test_every_policy_meets_every_case_and_seed_once_and_one_run_is_repeated():
    chosen = [case for case in cases(quick=True) if case.name in QUICK_CASES]
    assert {case.name for case in chosen} == QUICK_CASES
    tasks = plan(chosen, [1, 2], load_step_time("opt-6.7b-a100"), quick=True)
    counts = Counter((task.label, task.case, task.seed) for task in tasks)
    again = (AGAIN, chosen[0].name, 1)
    assert counts.pop(again) == 1
    assert set(counts) == {(p.name, c.name, s) for p in POLICIES for c in chosen for s in (1, 2)}
    assert set(counts.values()) == {1}


def test_without_sglang_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(sglang_dlpm, "find_spec", lambda name: None)
    done = CliRunner().invoke(bench, ["--quick"])
    assert done.exit_code == 1
    assert "penstock[sglang]" in done.output
