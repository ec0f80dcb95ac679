"""Profiles that are measured: plans fit into the engine, fits find what is true, files are checked."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.profile_fit import MeasuredStep, errors_by_kind, fit_profile, split, warmed_up
from penstock.schedulers.slo.profile_plan import CONTEXTS, REPEATS, Room, batches
from penstock.schedulers.slo.profiles import Profile, find_profile, write_profile
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel

TRUTH = Profile(base_s=4e-3, token_s=3e-5, knees_s=(2e-5, 0.0), request_s=5e-5, context_s=2e-7)


def measured(truth, seed=0, noise=0.03, outliers=0.0):
    """Steps as a plan makes them, with noise, and now and then one that the machine disturbed."""
    rng = random.Random(seed)
    model = StepTimeModel(truth)
    steps = []
    for number in range(24):
        decodes, context = rng.choice((0, 1, 4, 16, 63)), rng.choice(CONTEXTS)
        for chunk in (0, 0, 0, 0, *(rng.choice((16, 64, 256, 700, 1500)) for _ in range(4))):
            requests = decodes + (chunk > 0)
            if not requests:
                continue
            for _ in range(REPEATS):
                features = StepFeatures(decodes + chunk, requests, decodes * context)
                seconds = model.seconds(features) * rng.uniform(1 - noise, 1 + noise)
                seconds *= 15.0 if rng.random() < outliers else 1.0
                steps.append(MeasuredStep(features, seconds, number, decodes))
    return steps


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 8, 64, 256, 1000]),
    st.sampled_from([1, 16, 64, 300, 2048, 8192]),
    st.sampled_from([2, 64, 200, 2048, 32768]),
    st.sampled_from([64, 512, 4096, 65536, 10**6]),
)
def test_every_batch_fits_into_the_engine(requests, step_tokens, request_tokens, kv_tokens):
    room = Room(requests, max(step_tokens, requests), request_tokens, kv_tokens)
    plan = batches(room)
    for batch in plan:
        longest = max(batch.chunks, default=0)
        assert batch.decodes + (longest > 0) <= room.requests
        assert longest < room.request_tokens
        assert batch.context + batch.output_tokens <= room.request_tokens
        assert batch.decodes * (batch.context + batch.output_tokens) + longest <= room.kv_tokens
        if batch.decodes:
            assert batch.decodes + longest <= room.step_tokens
    assert len({(batch.decodes, batch.context) for batch in plan}) == len(plan)


def test_a_plan_reaches_from_one_request_to_a_full_engine():
    plan = batches(Room(64, 2048, 8192, 500_000))
    assert plan[0].decodes == 0
    assert max(plan[0].chunks) == 4 * 2048 - 1 or max(plan[0].chunks) == 8191
    assert {batch.decodes for batch in plan} == {0, 1, 4, 16, 63}
    assert {batch.context for batch in plan if batch.decodes == 63} == {64, 256, 1024, 4096}
    assert max(max(batch.chunks) + batch.decodes for batch in plan[1:]) == 2048


@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_the_fit_finds_what_is_true(outliers):
    fitted, _ = split(measured(TRUTH, outliers=outliers))
    found = fit_profile(fitted, "here")
    fresh = measured(TRUTH, seed=1, noise=0.0)
    assert errors_by_kind(found, fresh)["all"].p90 < 0.05
    assert found.source == "here"
    assert found.base_s == pytest.approx(TRUTH.base_s, rel=0.2)
    assert found.context_s == pytest.approx(TRUTH.context_s, rel=0.2)


def test_every_kind_of_step_is_fitted_and_held_out():
    steps = measured(TRUTH)
    fitted, held_out = split(steps)
    assert sorted(fitted + held_out) == sorted(steps)
    assert len(held_out) == pytest.approx(len(steps) / 4, abs=1)
    kinds = {step.kind for step in steps}
    assert kinds == {step.kind for step in fitted} == {step.kind for step in held_out}


def test_errors_are_told_for_each_kind_of_step():
    steps = measured(TRUTH, noise=0.0)
    found = errors_by_kind(TRUTH, steps)
    assert list(found) == ["decodes", "decodes and prompts", "prompts", "all"]
    assert sum(row.steps for name, row in found.items() if name != "all") == found["all"].steps == len(steps)
    assert found["all"].p90 == pytest.approx(0.0, abs=1e-9)
    slower = [step._replace(seconds=1.5 * step.seconds) for step in steps]
    assert errors_by_kind(TRUTH, slower)["prompts"].median == pytest.approx(0.5)


def test_the_first_of_steps_that_are_alike_is_not_counted():
    features = StepFeatures(20, 4, 1000)
    cold = MeasuredStep(features, 9.0, 0, 4)
    alone = MeasuredStep(StepFeatures(900, 1, 0), 2.0, 0, 0)
    steps = [cold, cold._replace(seconds=1.0), alone, cold._replace(seconds=1.1)]
    assert sorted(step.seconds for step in warmed_up(steps)) == [1.0, 1.1, 2.0]


@pytest.mark.parametrize("steps", [[], measured(TRUTH)[:10], [measured(TRUTH)[0]] * 50])
def test_too_little_is_no_profile(steps):
    with pytest.raises(ValueError, match="were measured, needed: 24 of 3 sizes"):
        fit_profile(steps)


def test_a_profile_comes_back_from_its_file_and_a_configuration_takes_it(tmp_path):
    file = tmp_path / "mine.json"
    write_profile(file, TRUTH)
    assert find_profile(str(file)) == TRUTH
    assert SLOConfig(profile=str(file)).profile == str(file)
    assert [found.name for found in tmp_path.iterdir()] == ["mine.json"]


BAD = {
    "no JSON": (b"{", "no step-time profile"),
    "no text": (b"\xff\xfe\x00", "no step-time profile"),
    "a list": (b"[]", "no step-time profile: Expected object, not array"),
    "a cost is missing": (b'{"base_s": 0.1}', "missing required field token_s"),
    "a cost below 0": (b'{"base_s": 0.1, "token_s": -1}', "token_s"),
    "text for a cost": (b'{"base_s": "fast", "token_s": 1}', "Expected float, not str"),
    "an unknown key": (b'{"base_s": 0.1, "token_s": 1, "tokens": 2}', "unknown field tokens"),
    "steps that cost nothing": (b'{"base_s": 0.0, "token_s": 0}', "base_s and token_s 0"),
}


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_and_named(tmp_path, content, says):
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        find_profile(str(file))
    assert str(file) in str(caught.value)


def test_the_shipped_profiles_can_all_be_read_as_files(tmp_path):
    """What is measured and what is shipped are one format."""
    from penstock.schedulers.slo.profiles import FILE

    for name, content in json.loads(FILE.read_text()).items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        assert find_profile(str(file)) == find_profile(name)
