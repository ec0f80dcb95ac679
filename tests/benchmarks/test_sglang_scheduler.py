"""``penstock bench sglang-scheduler``: what its rows and claims make of passes."""

from __future__ import annotations

from click.testing import CliRunner

from penstock.benchmarks import sglang_scheduler
from penstock.benchmarks.sglang_scheduler import (
    ADMISSION,
    BARE,
    DECODE,
    SHUFFLED,
    PassingClock,
    bench,
    claims_of,
    cost_of,
    row_of,
)


def test_passes_of_all_blocks_are_compared_by_kind_with_those_of_fcfs():
    plain = cost_of("fcfs", [{DECODE: [1.0, 2.0], ADMISSION: []}, {DECODE: [9.0], ADMISSION: [4.0]}], [], {})
    ours = cost_of(
        "slo",
        [{DECODE: [2.3, 2.4], ADMISSION: [4.2]}],
        [(DECODE, 30), (DECODE, 10), (ADMISSION, 7), (DECODE, 20)],
        {"plans": 6.0, "replans": 3.0},
    )
    row = row_of(ours, plain)
    assert (row["decode ms"], row["decode calls"], row["admission calls"]) == (2.3499999999999996, 20, 7)
    assert (row["plans a pass"], row["replans a pass"]) == (2.0, 1.0)
    assert [(claim.holds, round(claim.value, 2)) for claim in claims_of([plain, ours])] == [
        (False, 0.35),
        (True, 0.2),
    ]


def test_a_kind_of_which_there_was_no_pass_has_no_claim():
    plain = cost_of("fcfs", [{DECODE: [1.0], ADMISSION: []}], [], {})
    assert row_of(plain, plain)["admission ms"] is None
    ours = cost_of("dlpm", [{DECODE: [1.0], ADMISSION: [2.0]}], [], {})
    assert [claim.value for claim in claims_of([plain, ours])] == [0.0]


def test_without_sglang_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(sglang_scheduler, "find_spec", lambda name: None)
    done = CliRunner().invoke(bench, ["--quick"])
    assert done.exit_code == 1
    assert "penstock[sglang]" in done.output


def test_a_call_more_with_penstock_loaded_and_nothing_asked_of_it_fails_the_claim():
    for calls, holds in ((20, True), (19, False)):
        plain = cost_of("fcfs", [{DECODE: [1.0], ADMISSION: []}], [(DECODE, 20)], {})
        bare = cost_of(BARE, [{DECODE: [1.0], ADMISSION: []}], [(DECODE, calls)], {})
        assert [claim.holds for claim in claims_of([plain, bare])] == [holds]


def test_what_another_order_costs_stock_is_told_from_what_a_policy_costs():
    plain, shuffled, ours = (
        cost_of(policy, [{DECODE: [1.0], ADMISSION: [ms]}], [], {})
        for policy, ms in (("fcfs", 2.0), (SHUFFLED, 2.4), ("vtc", 2.5))
    )
    found = {claim.name: (round(claim.value, 3), claim.holds) for claim in claims_of([plain, shuffled, ours])}
    assert found["vtc: ms added, admission pass"] == (0.5, False)
    assert found["vtc: ms added beyond a shuffled queue, admission pass"] == (0.1, True)
    assert not any(name.startswith(SHUFFLED) for name in found)


def test_the_clock_goes_on_in_a_turn_unless_it_stands():
    going, standing = PassingClock(stands=False), PassingClock(stands=True)
    began = going()
    while going() == began:
        pass
    for clock in (going, standing):
        before = clock()
        clock.turn(0.5)
        assert clock() - before >= 0.5
    assert standing() == 0.5
