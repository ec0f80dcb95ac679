"""Output lengths against the quantiles of what was shown."""

from __future__ import annotations

import random

import numpy as np
import pytest

from penstock.schedulers.slo.lengths import LAST_TOKENS, MOST_CLASSES, OutputLengths, bucket_of, end_of


def test_a_length_lies_in_its_bucket():
    for tokens in (1, 2, 3, 17, 100, 1000, 99_999):
        bucket = bucket_of(tokens)
        assert tokens <= end_of(bucket) + 1e-6
        assert bucket == 0 or tokens > end_of(bucket - 1)


@pytest.mark.parametrize("generated", [0, 50, 200, 600])
@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
def test_quantiles_are_those_of_the_lengths_that_were_not_over_yet(generated, quantile):
    rng = random.Random(1)
    lengths = OutputLengths()
    shown = [int(rng.lognormvariate(5.0, 0.9)) + 1 for _ in range(3000)]
    for tokens in shown:
        lengths.observe("chat", tokens)
    recent = [tokens for tokens in shown if tokens > generated]
    exact = sorted(recent)[int(quantile * len(recent))]
    assert exact / 1.5 <= lengths.total("chat", quantile, generated) <= exact * 1.5


def test_a_class_moves_away_from_all_classes_as_it_is_seen():
    lengths = OutputLengths()
    for _ in range(200):
        lengths.observe("short", 20)
    assert lengths.total("new", 0.5) <= 40
    for _ in range(60):
        lengths.observe("long", 2000)
    assert lengths.total("short", 0.5) <= 30
    assert lengths.total("long", 0.5) >= 1500


def test_old_lengths_are_forgotten():
    lengths = OutputLengths()
    for _ in range(3000):
        lengths.observe("c", 10)
    for _ in range(3000):
        lengths.observe("c", 1000)
    assert lengths.total("c", 0.5) >= 900


def test_a_request_that_outlives_everything_is_expected_to_go_on_up_to_its_bound():
    lengths = OutputLengths()
    for _ in range(5000):
        lengths.observe("c", 10)
    assert lengths.remaining("c", 0.5, 50_000) > 10_000
    assert lengths.remaining("c", 0.5, 50_000, most=50_010) == 10
    assert lengths.remaining("c", 0.5, 50_010, most=50_010) == 0


def test_a_cold_start_expects_something_and_classes_without_end_are_bounded():
    lengths = OutputLengths()
    assert 100 < lengths.total("x", 0.5) < 500
    for i in range(MOST_CLASSES * 3):
        lengths.observe(f"class {i}", 100)
        lengths.total(f"class {i}", 0.5)
    lengths.check_integrity()
    assert len(lengths._classes) == MOST_CLASSES


def test_what_many_have_left_is_what_each_has_left():
    rng = random.Random(0)
    lengths = OutputLengths()
    for _ in range(300):
        lengths.observe(f"class {rng.randrange(400)}", rng.randint(1, 500))
        if rng.random() < 0.05:
            names = [f"class {rng.randrange(450)}" for _ in range(20)]
            begun = rng.random() < 0.7
            generated = [begun * rng.choice((0, rng.randrange(1, 3000))) for _ in names]
            most = [rng.choice((100, 1 << 20)) for _ in names]
            for quantile in (0.1, 0.6):
                found = lengths.remaining_of_each(names, quantile, np.array(generated), np.array(most))
                each = zip(names, generated, most, strict=True)
                assert found.tolist() == [lengths.remaining(name, quantile, g, m) for name, g, m in each]


def test_a_bucket_ends_where_the_next_one_begins():
    for bucket, tokens in enumerate(LAST_TOKENS[:-1].tolist()):
        assert bucket_of(tokens) <= bucket < bucket_of(tokens + 1)


@pytest.mark.parametrize("generated", [1, 50, 200, 600])
def test_the_chance_to_end_soon_is_the_share_of_the_lengths_that_did(generated):
    rng = random.Random(2)
    lengths = OutputLengths()
    shown = [int(rng.lognormvariate(5.0, 0.9)) + 1 for _ in range(3000)]
    for tokens in shown:
        lengths.observe("chat", tokens)
    soon = np.array([[2.0], [10.0], [40.0], [200.0], [5000.0]])
    found = lengths.ends_within(["chat"], np.array([generated]), np.array([1 << 20]), soon)[:, 0]
    left = [tokens - generated for tokens in shown if tokens > generated]
    exact = [sum(one <= within for one in left) / len(left) for within in soon[:, 0]]
    assert found == pytest.approx(exact, abs=0.05)


def test_an_answer_ends_within_what_it_may_have_and_not_within_nothing():
    lengths = OutputLengths()
    for _ in range(5000):
        lengths.observe("c", 100)
    generated, most = np.array([10, 10, 3000, 3000]), np.array([15, 1000, 4000, 1 << 20])
    found = lengths.ends_within(["c"] * 4, generated, most, np.array([[0.0], [5.0], [1000.0], [3000.0]]))
    assert found[0].tolist() == [0.0] * 4
    assert found[1, 0] == 1.0
    assert found[1, 1] < 0.01
    assert found[2].tolist() == pytest.approx([1.0, 1.0, 1.0, 2 / 3], abs=0.02)
    assert (np.diff(found, axis=0) >= 0).all()
    assert found.max() <= 1.0
