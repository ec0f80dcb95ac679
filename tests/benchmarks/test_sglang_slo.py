"""``penstock bench sglang-slo``: what competes, what an interrupted run does not do again, and what is said
where SGLang is missing."""

from __future__ import annotations

import io

import pytest
from click.testing import CliRunner
from rich.console import Console

from penstock.benchmarks import slo_bench
from penstock.benchmarks.journal import Journal
from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.sglang_slo import bench
from penstock.benchmarks.slo_bench import Searches
from penstock.benchmarks.slo_run import Task
from penstock.benchmarks.slo_sglang import families, in_a_fork
from penstock.benchmarks.slo_stages import OURS, PRIORITY, STOCK
from penstock.simulation.step_time import load_step_time


@pytest.mark.parametrize("quick", [True, False])
def test_stock_is_tried_in_at_least_as_many_settings_as_ours(quick):
    found = families(quick=quick)
    assert found.keys() == {STOCK, PRIORITY, *OURS.values()}
    assert all(len(found[STOCK]) >= len(found[family]) for family in OURS.values())
    names = [setting.name for settings in found.values() for setting in settings]
    assert len(names) == len(set(names))


def test_stock_has_a_sweep_of_chunks_with_mixed_passes_and_without_and_another_order():
    stock = families(quick=False)[STOCK]
    swept = {
        mixed: {
            one.budget
            for one in stock
            if one.engine["mixed_chunk"] is mixed and "schedule_policy" not in one.engine
        }
        for mixed in (True, False)
    }
    assert swept[True] == swept[False] == {512, 1024, 2048, 8192}
    assert {one.engine.get("schedule_policy") for one in stock} == {None, "shortest-prefill-first"}
    assert not any(one.slo for one in stock)


def test_searches_of_a_run_that_was_interrupted_are_not_made_again(tmp_path):
    step_time = load_step_time("opt-6.7b-a100")
    setting = families(quick=True)[STOCK][0]
    tasks = [
        Task(app="chat", setting=setting, seeds=(seed,), requests=20, step_time=step_time)
        for seed in range(4)
    ]
    run: list[Task] = []

    def two_of_them(given):
        for task in given:
            if len(run) == 2:
                raise KeyboardInterrupt
            run.append(task)
            yield {float(task.seeds[0]): []}

    def the_rest(given):
        run.extend(given)
        return [{float(task.seeds[0]): []} for task in given]

    def searches(run_each):
        journal = Journal(tmp_path / "journal", ("schedulers",))
        return Searches("slo", run_each, journal, Narrator(Console(file=io.StringIO())))

    with pytest.raises(KeyboardInterrupt):
        searches(two_of_them)(tasks)
    curves = searches(the_rest)(tasks)
    assert curves == [{float(seed): []} for seed in range(4)]
    assert run == tasks


def test_a_fork_gives_back_what_was_made_and_changes_nothing_here(capfd):
    here = [1]
    assert in_a_fork(lambda: [*here, here.append(2)]) == [1, None]
    assert here == [1]
    with pytest.raises(RuntimeError, match="a window failed"):
        in_a_fork(lambda: here[7])
    assert "IndexError" in capfd.readouterr().err


def test_without_sglang_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(slo_bench, "find_spec", lambda name: None)
    done = CliRunner().invoke(bench, ["--quick"])
    assert done.exit_code == 1
    assert "penstock[sglang]" in done.output
