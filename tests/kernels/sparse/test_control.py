"""Configuration, margins, and where attention stays dense."""

from __future__ import annotations

import random

import msgspec
import pytest

torch = pytest.importorskip("torch")

from penstock.kernels.sparse.calibration import Calibration, needed_margin, with_margin  # noqa: E402
from penstock.kernels.sparse.config import SparseConfig  # noqa: E402
from penstock.kernels.sparse.fallback import Reason, reason_before  # noqa: E402
from penstock.kernels.sparse.page_choice import measure  # noqa: E402


@pytest.mark.parametrize("mass", [0, -0.1, 1.01, 2])
def test_a_mass_that_is_no_share_is_refused(mass):
    with pytest.raises(msgspec.ValidationError, match="mass"):
        msgspec.convert({"mass": mass}, SparseConfig)
    with pytest.raises(ValueError, match=r"mass: given .*, allowed: above 0, at most 1"):
        SparseConfig(mass=mass)


@pytest.mark.parametrize(
    ("given", "named"),
    [({"key_bits": 3}, "key_bits"), ({"clusters": 5}, "clusters"), ({"cluster_tokens": 1}, "cluster_tokens")],
)
def test_unknown_and_impossible_keys_are_named(given, named):
    with pytest.raises(msgspec.ValidationError, match=named):
        msgspec.convert(given, SparseConfig)


def test_sizes_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="at most segment_tokens=512"):
        SparseConfig(segment_tokens=512)
    with pytest.raises(ValueError, match="at most recluster_tokens=64"):
        SparseConfig(recluster_tokens=64, cluster_tokens=128)


def test_a_margin_moves_a_mass_and_keeps_one_and_order():
    assert with_margin(0.9, 0.0) == pytest.approx(0.9)
    assert with_margin(0.5, 1.0) == pytest.approx(0.7310586)
    assert with_margin(1.0, -2.0) == 1.0
    assert with_margin(0.8, 0.5) < with_margin(0.9, 0.5) < 1


def test_the_needed_margin_is_the_share_that_would_have_been_enough():
    asked = [0.5, 0.7, 0.9, 0.99]
    exact = needed_margin(asked, asked, 0.8)
    assert exact == pytest.approx(0.0, abs=1e-6)
    short = needed_margin(asked, [one - 0.1 for one in asked], 0.75)
    assert with_margin(0.75, short) == pytest.approx(0.85, abs=1e-6)
    assert needed_margin(asked, [0.0] * 4, 0.9) == 6.0
    assert needed_margin(asked, [0.999] * 4, 0.9) == -2.0


def test_margins_learned_from_measurements_attain_what_was_promised_in_new_ones():
    config = SparseConfig(mass=0.9, attained_share=0.95, calibration_window=400, spare_margin=0.0)
    calibration = Calibration(config)
    noise = random.Random(1)
    needs = [noise.gauss(0.1, 0.2) for _ in range(5400)]
    for need in needs[:400]:
        calibration.measured(3, 0.9, need)
    margin = calibration.margin(3)
    kept = sum(need <= margin for need in needs[400:]) / 5000
    assert kept == pytest.approx(0.95, abs=0.03)
    assert calibration.ask(3) == with_margin(0.9, margin)
    assert calibration.margin(2) == config.margin


def test_old_measurements_are_forgotten_and_few_never_lower_the_margin():
    config = SparseConfig(calibration_window=100, attained_share=0.9)
    calibration = Calibration(config)
    calibration.measured(0, 0.5, -1.0)
    assert calibration.margin(0) == config.margin
    for need in [3.0] * 100 + [0.5] * 100:
        calibration.measured(0, 0.9, need)
    assert calibration.margin(0) == pytest.approx(0.5 + 0.08)


def test_measurements_that_any_margin_would_satisfy_leave_the_margin_to_those_that_need_one():
    config = SparseConfig(calibration_window=512, attained_share=0.9)
    calibration = Calibration(config)
    for number in range(400):
        calibration.measured(0, 0.99, 3.0 if number % 20 == 0 else None)
    assert calibration.margin(0) == pytest.approx(3.08)
    for _ in range(40):
        calibration.measured(1, 0.99, None)
    # A layer that needs no margin is not measured for ever, and keeps the one that it was given.
    assert calibration.settled(1)
    assert calibration.margin(1) == config.margin


def test_measured_masses_are_reported_and_samples_are_a_share():
    calibration = Calibration(SparseConfig(calibration_share=0.1, seed=4))
    assert calibration.attained(0) is None
    for number in range(100):
        calibration.measured(0, number / 100, 0.0)
    assert calibration.attained(0) == (0.1, 0.5)
    taken = [calibration.sampled(32) for _ in range(200)]
    assert sum(map(len, taken)) == pytest.approx(640, rel=0.2)
    assert {head for heads in taken for head in heads} == set(range(32))
    again = Calibration(SparseConfig(calibration_share=0.1, seed=4))
    assert [again.sampled(32) for _ in range(200)] == taken


def test_first_layers_and_short_contexts_are_dense():
    config = SparseConfig(dense_layers=2, least_tokens=1000)
    assert reason_before(config, 1, 5000) is Reason.FIRST_LAYERS
    assert reason_before(config, 2, 999) is Reason.SHORT_CONTEXT
    assert reason_before(config, 2, 1000) is None


def test_kept_pages_that_have_the_mass_say_nothing_of_the_margin():
    kept = torch.tensor([True, False, False, False])
    exact = torch.tensor([[0.95, 0.03, 0.01, 0.01], [0.5, 0.3, 0.1, 0.1]])
    alone, needed = measure("ranked", 0.9, exact, exact, kept)
    assert alone is None
    assert needed == pytest.approx(0.0, abs=0.5)
