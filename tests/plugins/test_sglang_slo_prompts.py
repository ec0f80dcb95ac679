"""What SGLang's passes make of the prompts of a plan, without SGLang: shares are checked against what its
scheduler can do with them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.plugins.sglang.slo_prompts import NOTHING, PromptPasses, Share
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.plan import Plan
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.requests import Running, Waiting
from penstock.schedulers.slo.step_time import StepFeatures

DECODES = StepFeatures(8, 8, 4000)
IDLE = StepFeatures(0, 0, 0)
MOST = 8192
PACE_S = 0.1


def planner(waiting: dict[str, int], pace: str = "mean") -> Planner:
    found = Planner(SLOConfig(profile="a100-7b", pace=pace))
    for name, tokens in waiting.items():
        found.arrive(Waiting(request_id=name, client="", tokens=tokens, arrival_s=0.0))
    return found


def plan(caps: dict[str, int], part: str = "part") -> Plan:
    return Plan(active=True, caps=caps, waiting=tuple(name for name in caps if name != part))


def part(missing: int) -> Running:
    return Running(request_id="part", arrival_s=0.0, tokens=missing + 100, computed_tokens=100)


def passes(of: Planner, *, mixed: bool = True, page: int = 1) -> PromptPasses:
    return PromptPasses(of, mixed=mixed, page=page)


def test_without_a_prompt_in_chunks_the_plan_is_the_pass():
    found = passes(planner({"a": 100, "b": 900}))
    assert found.share(plan({"a": 100, "b": 50}), None, DECODES, PACE_S, MOST) == Share(150, 0, False)
    assert found.share(plan({"a": 100}), None, DECODES, PACE_S, MOST) == Share(100, 0, True)


def test_who_comes_in_whole_does_so_beside_the_one_in_chunks():
    found = passes(planner({"a": 100}), page=16).share(plan({"a": 100}), part(5000), DECODES, PACE_S, MOST)
    assert found == Share(112 + 16, 16, False)


def test_a_part_that_cannot_come_in_ends_the_one_in_chunks():
    found = passes(planner({"a": 900})).share(plan({"a": 300, "part": 40}), part(250), DECODES, PACE_S, MOST)
    assert found == Share(340, 250, False)


def test_a_prompt_longer_than_any_pass_does_not_keep_the_one_in_chunks_waiting():
    found = passes(planner({"a": 8000})).share(plan({"a": 300}), part(5000), DECODES, PACE_S, MOST)
    assert found == Share(300, 300, False)


@pytest.mark.parametrize("mixed", [True, False])
def test_decodes_gain_slack_for_a_prompt_that_fits_a_longer_pass_but_not_for_ever(mixed):
    of = planner({"a": 900})
    found = passes(of, mixed=mixed)
    most = of.config.most_skipped_steps
    shares = [found.share(plan({"a": 300}), part(5000), DECODES, PACE_S, MOST) for _ in range(most + 1)]
    assert shares == [NOTHING] * most + [Share(300, 300, False)]
    assert found.share(plan({"a": 300}), part(5000), DECODES, PACE_S, MOST) == NOTHING


@pytest.mark.parametrize(
    ("pace", "decodes", "tpot_s"), [("gap", DECODES, PACE_S), ("mean", DECODES, 0.001), ("mean", IDLE, 0.0)]
)
def test_where_decodes_gain_nothing_the_one_in_chunks_goes_on(pace, decodes, tpot_s):
    found = passes(planner({"a": 900}, pace)).share(plan({"a": 300}), part(5000), decodes, tpot_s, MOST)
    assert found == Share(300, 300, False)


def test_few_tokens_of_a_prompt_have_no_pass_of_their_own_while_decodes_wait():
    of = planner({"a": 2000})
    assert passes(of, mixed=False).share(plan({"a": 128}), None, DECODES, PACE_S, MOST) == NOTHING
    assert passes(of, mixed=True).share(plan({"a": 128}), None, DECODES, PACE_S, MOST).tokens == 128
    assert passes(of, mixed=False).share(plan({"a": 1900}), None, DECODES, PACE_S, MOST).tokens == 1900
    assert passes(of, mixed=False).share(plan({"a": 128}), None, IDLE, 0.0, MOST).tokens == 128
    short = passes(planner({"a": 128}), mixed=False)
    assert short.share(plan({"a": 128}), None, DECODES, PACE_S, MOST) == Share(128, 0, True)


def test_passes_without_a_prompt_in_the_plan_do_not_count():
    of = planner({"a": 900})
    found = passes(of)
    for _ in range(3 * of.config.most_skipped_steps):
        assert not found.share(plan({}), None, DECODES, PACE_S, MOST).tokens
    assert found.share(plan({"a": 300}), part(5000), DECODES, PACE_S, MOST) == NOTHING


@given(
    jobs=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), max_size=5),
    missing=st.one_of(st.none(), st.integers(1, 9000)),
    own=st.integers(0, 3000),
    page=st.sampled_from([1, 16, 64]),
    mixed=st.booleans(),
    tpot_s=st.sampled_from([0.0, 0.001, 0.05, 0.2]),
)
def test_what_is_planned_whole_fits_beside_the_chunk_in_every_share(jobs, missing, own, page, mixed, tpot_s):
    names = {f"r{number}": tokens for number, (tokens, _) in enumerate(jobs)}
    caps = {f"r{number}": min(cap, tokens) for number, (tokens, cap) in enumerate(jobs)}
    running = None if missing is None else part(missing)
    if running is not None and own:
        caps["part"] = min(own, running.missing_tokens)
    found = passes(planner(names), mixed=mixed, page=page).share(plan(caps), running, DECODES, tpot_s, MOST)
    whole = sum(-(-names[name] // page) * page for name in names if caps[name] == names[name])
    if found.tokens:
        assert found.tokens % page == found.chunk_tokens % page == 0
        assert whole + found.chunk_tokens <= found.tokens <= sum(caps.values()) + page * (len(caps) + 1)
        assert (found.chunk_tokens > 0) == (running is not None)
    if running is not None:
        assert found.chunk_tokens < running.missing_tokens + page
