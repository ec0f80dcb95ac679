"""Step times: the published profiles, the KV-read term, and files that are none."""

from __future__ import annotations

import json

import pytest

from penstock.schedulers.slo.profiles import Profile, find_profile, write_profile
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.simulation.step_time import (
    KV_READ_S,
    Load,
    Piece,
    StepTime,
    load_step_time,
    of_profile,
    shipped,
)


def test_the_largest_piece_counts():
    model = StepTime(
        name="two",
        source="test",
        pieces=(Piece(fixed_s=1.0, per_token_s=0.01), Piece(fixed_s=0.1, per_token_s=0.1)),
    )
    assert model(Load(1, 1, 2, 0)) == pytest.approx(1.02)
    assert model(Load(90, 10, 11, 0)) == pytest.approx(10.1)


def test_a_published_profile_and_its_kv_read_term():
    plain, load = shipped()["opt-6.7b-a100"], Load(8000, 192, 193, 100_000)
    assert plain(load) == pytest.approx(3.03e-3 + 7.523e-5 * 8192)
    assert load_step_time("opt-6.7b-a100+kv")(load) == pytest.approx(plain(load) + KV_READ_S * 100_000)
    assert plain(Load(0, 1, 1, 0)) == pytest.approx(0.0248 + 6.878e-5)


def test_draft_steps_and_requests_cost_what_their_coefficients_say():
    model = StepTime(
        name="all",
        source="test",
        pieces=(Piece(fixed_s=0, per_token_s=0, per_request_s=2.0, per_draft_step_s=0.5),),
    )
    assert model(Load(5, 5, 3, 7, draft_steps=4)) == 8.0


def test_every_shipped_profile_names_its_source_and_grows_with_tokens():
    assert {"opt-6.7b-a100", "opt-13b-h100", "toolllama-7b-a100"} <= shipped().keys()
    for profile in shipped().values():
        assert profile.source
        assert profile(Load(8192, 0, 4, 0)) > profile(Load(0, 4, 4, 0)) > 0


def test_a_measured_profile_is_read_from_a_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps({"name": "mine", "source": "here", "pieces": [{"fixed_s": 0.5, "per_token_s": 0.25}]})
    )
    assert load_step_time(str(file))(Load(2, 0, 1, 9)) == 1.0


@pytest.mark.parametrize("tokens", [1, 200, 512, 513, 1500, 2048, 9000])
def test_a_prior_of_the_slo_policy_is_a_step_time(tokens, tmp_path):
    prior = Profile(base_s=0.01, token_s=4e-5, knees_s=(3e-5, 1e-5), request_s=2e-5, context_s=6e-8)
    seconds = StepTimeModel(prior).seconds(StepFeatures(tokens, 7, 40_000))
    write_profile(tmp_path / "mine.json", prior)
    for found in (of_profile("p", prior), load_step_time(str(tmp_path / "mine.json"))):
        assert found(Load(tokens - 1, 1, 7, 40_000)) == pytest.approx(seconds)


def test_shipped_priors_are_step_times_by_name():
    prior = find_profile("a100-13b-tp2")
    assert load_step_time("a100-13b-tp2")(Load(99, 1, 10, 5000)) == pytest.approx(
        StepTimeModel(prior).seconds(StepFeatures(100, 10, 5000))
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"name": "x", "source": "", "pieces": []}', "at least one piece"),
        ('{"name": "x", "source": "", "pieces": [{"fixed_s": -1, "per_token_s": 0}]}', "fixed_s"),
        ('{"name": "x", "source": "", "pieces": [{"fixed_s": 0, "per_tokens": 0}]}', "per_tokens"),
        ('{"base_s": -1, "token_s": 1}', "base_s"),
        ("[", "no step time"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_the_reason(tmp_path, text, why):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=why):
        load_step_time(str(file))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"opt-6\.7b-a100"):
        load_step_time("nothing")
