"""The DLPM bench: what is run, what is checked in every run, and what is made of the outcomes."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from penstock.benchmarks import dlpm
from penstock.benchmarks.dlpm_cases import POLICIES, QUANTUM, Case, cases, ours
from penstock.benchmarks.dlpm_claims import AGAIN, ENDLESS, EXTEND_ALONE, claims, summary
from penstock.benchmarks.dlpm_run import DeficitWatch, Outcome, Task, available, balanced, bounded, complete
from penstock.benchmarks.dlpm_sweeps import AGEING, FREE_OUTPUT, QUANTA, QUICK_VARIANTS, VARIANTS, variants
from penstock.schedulers.waiting import ClientService
from penstock.simulation.engine import Result
from penstock.simulation.records import Ask, Piece, Served
from penstock.simulation.step_time import shipped

PROFILE = shipped()["opt-6.7b-a100"]


def outcome(**given):
    fields = dict.fromkeys(
        ("tokens_per_s", "gap", "batch", "p50_ttft_s", "p99_ttft_s", "backlogged_share", "hit_rate"), 1.0
    )
    fields |= {"longest_ttft_s": 1.0}
    fields |= dict.fromkeys(("jain_extend", "jain_service", "jain_input"), 1.0)
    fields |= {"waits": 1000, "requests": 1, "preemptions": 0, "digest": "d", "shared_service": 1e9}
    return Outcome(**{**fields, **given})


def task(label, case="a", seed=0, step_time=PROFILE):
    return Task(label=label, case=case, policy=POLICIES[0], seed=seed, step_time=step_time, quick=True)


def by_claim(results, **case):
    known = {name: Case(name, ("x",), lambda seed: None, 1, **case) for name in "ab"}
    return {claim.name: claim for claim in claims(results, known)}


def find(found, part):
    (name,) = [name for name in found if part in name]
    return found[name]


def test_the_means_over_the_seeds_are_compared():
    rates = {"dlpm": (30.0, 50.0), "vtc": (10.0, 10.0), "lpm": (50.0, 50.0)}
    results = [
        (task(label, case=case, seed=seed), outcome(tokens_per_s=rate))
        for case in "ab"
        for label, both in rates.items()
        for seed, rate in enumerate(both)
    ]
    found = by_claim(results, most_local=True)
    assert find(found, "most local").value == pytest.approx(4.0)
    assert find(found, "geometric mean").value == pytest.approx(4.0)
    assert not find(found, "to LPM").holds
    row = next(row for row in summary(results) if row["policy"] == "dlpm")
    assert (row["seeds"], row["tokens/s"], row["spread"]) == (2, 40, 0.5)


def test_nothing_is_claimed_against_lpm_where_a_client_misbehaves():
    results = [(task(label), outcome()) for label in ("dlpm", "vtc", "lpm")]
    assert not [name for name in by_claim(results, unruly=frozenset({"x"})) if "to LPM" in name]


def test_jain_is_claimed_only_where_all_waited_for_long_enough():
    short, long = outcome(jain_service=0.3, shared_service=QUANTUM), outcome(jain_service=0.995)
    results = [(task("dlpm"), short), (task("dlpm", seed=1), long), (task("vtc"), long)]
    claim = find(by_claim(results), "Jain's index of extend + 2 output")
    assert claim.value == 0.995
    assert "1 of 2 runs" in claim.name


def test_jain_of_extend_tokens_alone_is_claimed_too():
    results = [(task("dlpm"), outcome(jain_extend=0.94)), (task("vtc"), outcome())]
    assert not find(by_claim(results), "Jain's index of extend tokens").holds


def test_the_gap_is_held_against_two_quanta_and_the_running_batch():
    results = [(task("dlpm"), outcome(gap=2 * QUANTUM + 100, batch=50)), (task("vtc"), outcome())]
    found = by_claim(results)
    assert not find(found, "quanta + running batch").holds
    assert find(found, "the paper's").holds


def test_charging_extend_tokens_alone_makes_a_claim_of_its_own():
    results = [(task(label), outcome()) for label in ("dlpm", "vtc")]
    results.append((task(EXTEND_ALONE), outcome(jain_extend=0.98)))
    assert not find(by_claim(results), "output uncharged").holds


def test_a_case_without_peers_makes_no_claim():
    results = [(task(label), outcome(gap=1e9)) for label in ("dlpm", "vtc")]
    assert not [name for name in by_claim(results, peers=False) if "gap" in name]


def test_waits_under_a_flood_are_compared_with_every_peer():
    waits = {"dlpm": 2.0, "vtc": 2.1, "lpm": 8.0, "fcfs": 4.0}
    results = [(task(label), outcome(p99_ttft_s=wait)) for label, wait in waits.items()]
    found = by_claim(results, flood=True)
    assert find(found, "of lpm").holds
    assert not find(found, "of fcfs").holds
    assert find(found, "to VTC's").holds


def test_the_steps_with_kv_read_make_claims_of_their_own():
    results = [
        (task(label, step_time=model), outcome(tokens_per_s=rate))
        for model, ratio in ((PROFILE, 2.0), (PROFILE.with_kv_read(), 1.2))
        for label, rate in (("dlpm", ratio), ("vtc", 1.0))
    ]
    found = by_claim(results, most_local=True)
    found = {name: claim for name, claim in found.items() if "most local" in name}
    assert sorted(round(claim.value, 6) for claim in found.values()) == [1.2, 2.0]


def test_a_p99_of_few_waits_is_not_compared_with_vtc_s():
    results = [(task(label), outcome(waits=80)) for label in ("dlpm", "vtc", "fcfs")]
    found = by_claim(results, flood=True)
    assert [name for name in found if "of fcfs" in name]
    assert not [name for name in found if "to VTC's" in name]


@pytest.mark.parametrize(("again", "endless"), [("d", "l"), ("other", "other")])
def test_digests_are_compared_with_the_run_that_they_repeat(again, endless):
    results = [
        (task("dlpm"), outcome(digest="d")),
        (task("lpm"), outcome(digest="l")),
        (task("lpm", seed=1), outcome(digest="x")),
        (task(AGAIN), outcome(digest=again)),
        (task(ENDLESS), outcome(digest=endless)),
    ]
    found = by_claim(results)
    assert find(found, "twice").holds is find(found, "endless").holds is (again == "d")


def served(name="r", client="x", *, output=2, prompt=10):
    ask = Ask(request_id=name, arrival_s=0.0, prompt=(Piece(1, prompt),), output_tokens=output, client=client)
    one = Served(ask, prompt)
    one.compute(0, prompt)
    one.token_times.extend([1.0] * output)
    one.finished_s = 1.0
    return one


def test_a_request_that_is_cut_short_or_an_idle_engine_is_a_fault():
    assert complete(Result([served()], 1.0, 3, 0)) == []
    lost = served("lost")
    lost.token_times.pop()
    found = complete(Result([served(), lost], 1.0, 3, 7))
    assert found == ["lost is incomplete", "7 steps scheduled nothing while requests waited"]


class Order:
    def __init__(self, *clients):
        self._clients = clients

    def clients(self):
        return self._clients


def watch_of(*clients):
    watch = DeficitWatch(Order(*clients))
    watch.stepped(None)
    return watch


def service(extend=10, output=2, standing=0.0, client="x"):
    return ClientService(client, extend, output, extend + 2 * output, standing, 0)


def test_charges_that_differ_from_what_was_served_are_faults():
    assert balanced([served()], watch_of(service())) == []
    assert len(balanced([served()], watch_of(service(extend=20)))) == 1
    assert len(balanced([served()], watch_of(service(output=3)))) == 1
    assert len(balanced([served()], watch_of(service(client="y")))) == 1
    assert balanced([served()], DeficitWatch(None)) == []


@pytest.mark.parametrize(("standing", "good"), [(2000, True), (2001, False), (-29, True), (-30, False)])
def test_a_deficit_lies_between_what_one_batch_can_owe_and_the_quantum(standing, good):
    case = Case("a", ("x",), lambda seed: None, 10)
    found = bounded(case, ours("dlpm", quantum_tokens=2000), watch_of(service(standing=standing)))
    assert (found == []) is good
    assert bounded(case, ours("vtc"), watch_of(service(standing=math.inf))) == []


def test_every_run_has_all_peers_on_equal_terms():
    tasks = dlpm.plan(quick=False, seeds=range(2), profile=PROFILE, trace=None)
    present = [policy.name for policy in POLICIES if available(policy)]
    assert {"fcfs", "priority"} <= set(present)
    for case in (case for case in cases(quick=False) if case.peers):
        more = [policy.name for policy in variants(case.name, quick=False) if available(policy)]
        for seed in range(2):
            for name in (PROFILE.name, PROFILE.with_kv_read().name):
                where = (case.name, seed, name)
                ran = [
                    one.label
                    for one in tasks
                    if (one.case, one.seed, one.step_time.name) == where and one.label not in (AGAIN, ENDLESS)
                ]
                assert ran == present + (more if name == PROFILE.name else [])


def test_no_run_is_scored_on_the_seed_that_settings_were_chosen_on(monkeypatch, tmp_path):
    pytest.importorskip("vllm")
    pytest.importorskip("matplotlib")
    seeds = set()

    def run_all(tasks, narrator):
        seeds.update(one.seed for one in tasks)
        return [(one, outcome()) for one in tasks]

    monkeypatch.setattr(dlpm, "run_all", run_all)
    result = CliRunner().invoke(dlpm.bench, ["--plot", str(tmp_path / "p.svg")])
    assert result.exit_code == 0, result.output
    assert seeds == {1, 2, 3}


def test_every_other_setting_runs_under_a_name_of_its_own():
    names = [one.name for one in (*QUANTA.values(), *AGEING, FREE_OUTPUT, *POLICIES)]
    assert len(set(names)) == len(names)
    assert {case.name for case in cases(quick=False)} >= VARIANTS.keys()
    assert {case.name for case in cases(quick=True)} >= QUICK_VARIANTS.keys()


def test_the_report_has_rows_claims_and_all_plots(monkeypatch, tmp_path):
    pytest.importorskip("vllm")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(dlpm, "run_all", lambda tasks, narrator: [(one, outcome()) for one in tasks])
    file, plot = tmp_path / "r.json", tmp_path / "p.svg"
    result = CliRunner().invoke(dlpm.bench, ["--quick", "--json", str(file), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["bench"] == "dlpm"
    assert {row["case"] for row in written["rows"]} == {case.name for case in cases(quick=True)}
    assert written["claims"]
    plots = ("p-throughput.svg", "p-fairness.svg", "p-quantum.svg")
    assert {one.name for one in tmp_path.iterdir()} == {"r.json", *plots}


def test_an_unknown_step_time_is_refused_with_the_known_ones():
    pytest.importorskip("vllm")
    result = CliRunner().invoke(dlpm.bench, ["--step-time", "nothing"])
    assert result.exit_code == 2
    assert "opt-13b-h100" in result.output


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: case.name)
def test_every_clients_documents_are_named_by_the_case_that_asks_them(case):
    asks = list(case.make(0).begin())
    assert {one.client for one in asks} <= set(case.clients)
    assert case.unruly <= set(case.clients)
    assert max(one.prompt_tokens + one.output_tokens for one in asks) < case.kv_tokens
