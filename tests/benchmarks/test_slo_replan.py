from __future__ import annotations

import pytest

from penstock.benchmarks.slo_replan import claims_of, compare_rules, make_instance, solve_milp
from penstock.schedulers.slo.rules import RULES


@pytest.mark.parametrize("unit", [True, False])
def test_highs_finds_the_optimum_of_the_dynamic_program(unit):
    for seed in range(6):
        instance = make_instance(seed, 12, 2, 1.5, unit=unit)
        assert solve_milp(instance).profit == pytest.approx(RULES["dynamic_program"](instance, 10**9).profit)


def test_a_gap_to_highs_and_a_late_replan_are_claims_that_fail():
    regret = compare_rules(((8, 2),), problems=2)
    replan = {"rule": "moore_hodgson", "median_ms": 1.0, "p99_ms": 3.0}
    assert all(claim.holds for claim in claims_of(regret, [replan]))
    wrong = [{**row, "milp_largest_gap": 0.1} for row in regret]
    failed = [claim.name for claim in claims_of(wrong, [{**replan, "p99_ms": 11.0}]) if not claim.holds]
    assert len(failed) == 2
