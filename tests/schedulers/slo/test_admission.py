"""Admission against trying every subset."""

from __future__ import annotations

import math
import random

import pytest
import slo_instances as instances

from penstock.schedulers.slo import dynamic_program as program
from penstock.schedulers.slo.admission import Candidate, Decision, Instance, feasible
from penstock.schedulers.slo.rules import RULES, dynamic_program, edf_greedy, moore_hodgson

KEEPING = sorted(RULES.keys() - {"sustained"})
"""Rules under which every admitted prompt is computed by its deadline."""


@pytest.mark.parametrize("block", range(6))
def test_the_dynamic_program_is_worth_what_the_best_subset_is(block):
    for seed in range(block * 500, block * 500 + 500):
        instance = instances.random_instance(seed, 8 if seed % 10 == 0 else 6)
        found = dynamic_program(instance, None)
        assert instances.definition_feasible(instance, set(found.accepted)), seed
        assert math.isclose(found.profit, instances.best_by_trying(instance), abs_tol=1e-9), seed


def test_the_inverted_rule_of_dominance_would_be_noticed(monkeypatch):
    """Keeping the state with less left-over budget loses the only one that can accept what comes later."""

    def inverted(left, right):
        return left.profit >= right.profit and left.budget <= right.budget and left.memory <= right.memory

    monkeypatch.setattr(program, "dominates", inverted)
    lost = 0
    for seed in range(150):
        instance = instances.random_instance(seed, 6)
        nothing = Decision((), -math.inf)
        found = program.optimal(instance, nothing, edf_greedy, None)
        lost += found.profit < instances.best_by_trying(instance) - 1e-9
    assert lost


@pytest.mark.parametrize("name", KEEPING)
def test_a_rule_that_promises_deadlines_accepts_only_what_can_be_served_and_never_more_than_the_optimum(name):
    for seed in range(300):
        instance = instances.random_instance(seed, 7)
        found = RULES[name](instance, 10)
        assert feasible(instance, found.accepted)
        assert instances.definition_feasible(instance, set(found.accepted))
        assert found.profit <= dynamic_program(instance, None).profit + 1e-9


def test_a_race_for_deadlines_is_open_to_all_whose_decodes_and_memory_the_engine_holds():
    supply = instances.TableSupply(1000, [1, 1], [0, 0], 3)
    late = [Candidate(f"r{i}", 0.001 * i, 5000, 10, i % 2) for i in range(5)]
    assert RULES["sustained"](Instance(late, 1000, supply), 10).accepted == (0, 1, 2)
    assert RULES["sustained"](Instance(late, 25, supply), 10).accepted == (0, 1)


def test_when_everything_fits_every_rule_accepts_everything():
    supply = instances.TableSupply(1000, [1, 1], [0, 0], 100)
    candidates = [Candidate(f"r{i}", 1.0 + i, 100, 10, i % 2) for i in range(8)]
    instance = Instance(candidates, 1000, supply)
    for rule in RULES.values():
        assert rule(instance, 1000).accepted == tuple(range(8))


def test_moore_hodgson_is_optimal_for_equal_profits_at_a_constant_rate():
    for seed in range(150):
        rng = random.Random(seed)
        supply = instances.TableSupply(100, [0], [0], 100)
        candidates = sorted(
            (Candidate(f"r{i}", rng.uniform(0, 5), rng.randint(1, 300), 0, 0) for i in range(7)),
            key=lambda c: c.deadline_s,
        )
        instance = Instance(candidates, 1, supply)
        assert moore_hodgson(instance).profit == instances.best_by_trying(instance)


def test_more_memory_or_a_faster_engine_never_admits_less():
    for seed in range(200):
        small = instances.random_instance(seed, 7)
        optional = [c for c in small.candidates if not c.mandatory]
        if not optional:
            continue
        supply = small.supply
        faster = instances.TableSupply(supply.base * 1.5, supply.costs, supply.steps, supply.most)
        least = dynamic_program(Instance(optional, small.memory_tokens, supply), None).profit
        assert dynamic_program(Instance(optional, small.memory_tokens + 50, supply), None).profit >= least
        assert dynamic_program(Instance(optional, small.memory_tokens, faster), None).profit >= least


def test_what_was_admitted_stays_and_new_requests_do_not_make_it_late():
    supply = instances.TableSupply(100, [0], [0], 100)
    candidates = [
        Candidate("new", 1.0, 90, 0, 0, profit=100.0),
        Candidate("old", 1.0, 50, 0, 0, mandatory=True),
    ]
    for name in KEEPING:
        assert RULES[name](Instance(candidates, 1000, supply), 1000).accepted == (1,)


def test_an_admitted_request_that_is_late_anyway_blocks_nobody_behind_its_work():
    supply = instances.TableSupply(100, [0], [0], 100)
    candidates = [
        Candidate("late", 0.0, 100, 0, 0, mandatory=True),
        Candidate("new", 2.0, 90, 0, 0),
    ]
    for rule in RULES.values():
        assert rule(Instance(candidates, 1000, supply), 1000).accepted == (0, 1)


def test_past_the_bound_on_work_a_simpler_rule_decides_and_says_so():
    instance = instances.random_instance(3, 9)
    bounded = dynamic_program(instance, 0)
    assert not bounded.complete
    assert bounded.profit >= edf_greedy(instance).profit
    assert dynamic_program(instance, None).complete


def test_moore_hodgson_evicts_as_by_its_words():
    evicting = 0
    for seed in range(200):
        instance = instances.random_instance(seed, 30)
        found = moore_hodgson(instance).accepted
        assert found == instances.moore_hodgson_one_by_one(instance), seed
        evicting += 0 < len(found) < len(instance.candidates)
    assert evicting > 100
