"""The bench's models do what their rows say, in small."""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("vllm")

from penstock.benchmarks import slo_speculation
from penstock.benchmarks import speculation_cases as cases
from penstock.benchmarks.draft_texts import texts
from penstock.benchmarks.slo_run import Score
from penstock.benchmarks.speculation_cost import suffix_proposer, time_allocation
from penstock.benchmarks.speculation_model import Asked, Loop


def test_every_request_of_a_trace_ends_with_its_tokens_whatever_chooses_lengths():
    trace = cases.mixed_trace(10.0, 3.0, seed=1)
    for make in (None, partial(cases.scheduled, "3"), cases.ours):
        found = Loop(cases.ENGINES["h100-13b"], make, seed=0).run(trace)
        assert found.requests == len(trace)
        assert found.output_tokens == sum(asked.output for asked in trace)
        assert 0 <= found.accepted <= found.drafted
        assert (found.drafted == 0) == (make is None)


def test_a_draft_that_is_always_right_makes_a_step_give_all_its_tokens():
    trace = [Asked("r", 0.0, 10, 61, "c", 1.0)]
    found = Loop(cases.ENGINES["cheap tokens"], partial(cases.scheduled, "5"), seed=0).run(trace)
    assert found.steps == 1 + 60 // 6


def test_knowing_which_tokens_are_right_drafts_no_other():
    drafter = cases.MIXED[1]
    make = partial(cases.Knowing, profile=drafter.profile, tokens=True, in_passes=True)
    found = cases.attained(drafter, make, 6.0, 3.0, seed=1)
    assert found.accepted > 0
    # What is left are probes.
    assert found.drafted - found.accepted <= 0.1 * found.drafted


def test_a_draft_model_costs_its_passes_whether_tokens_are_right_or_not():
    trace = [Asked("r", 0.0, 10, 61, "c", 0.0)]
    truth = cases.find_profile("a100-13b-tp2")
    times = [Loop(truth, partial(cases.scheduled, name), seed=0).run(trace).ended_s for name in ("1", "5")]
    assert times[1] - times[0] == pytest.approx(61 * 4 * truth.pass_s, rel=0.2)


def test_capacity_is_where_attainment_crosses():
    rows = [
        {"lengths": "ours", "arrivals_per_s": rate, "attainment": share}
        for rate, share in ((10.0, 1.0), (20.0, 0.8), (30.0, 0.95))
    ]
    assert cases.capacity(rows, "ours") == pytest.approx(15.0)


def test_there_is_a_row_for_each_number_of_running_requests():
    assert [row["running"] for row in time_allocation(steps=3)] == [16, 64, 256]


def test_proposals_are_replayed_to_the_end_of_a_text():
    propose = suffix_proposer()
    (prompt, output), *_ = texts("quoting", 1)
    assert propose("r", prompt + output[:1], 1) is not None
    assert len(prompt) == 400
    assert len(output) == 200


def score(window):
    """Of an engine that sustains twice as much with drafts as without, with ours half as much again."""
    app = slo_speculation.APPS[window.app]
    drafts = {"off": 1.0, "": 3.0}.get(window.way.schedule, 2.0)
    good = 100 if window.rate < 0.6 * drafts * app.rate else 50
    rules = dict.fromkeys(("deadline", "mean", "gap"), good)
    return Score(requests=100, tokens=100, attained=rules, attained_tokens=rules, tiers={}, seconds=1.0)


def test_capacities_under_targets_are_searched_from_both_sides_and_compared():
    def run(windows):
        return [score(window) for window in windows]

    rows = slo_speculation.speculation_rows(["chat"], 2, 10, run)
    found = {row["way"]: row for row in rows}
    assert found[slo_speculation.OURS]["to stock"] == pytest.approx(1.5, rel=0.15)
    assert found[slo_speculation.PAPER]["to stock"] == pytest.approx(0.5, rel=0.15)
    assert found[slo_speculation.SCHEDULED]["schedule"] != "off"
    claims = slo_speculation.speculation_claims(rows)
    assert [claim.holds for claim in claims] == [True, True, True, True]
