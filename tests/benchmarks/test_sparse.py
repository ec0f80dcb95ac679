"""The bench of sparse attention measures what its rows say."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from penstock.benchmarks import sparse_run  # noqa: E402
from penstock.benchmarks.sparse_claims import budget_rows, claims, error_at, promise_rows  # noqa: E402
from penstock.benchmarks.sparse_keys import LEVELS, Layer, load_captured, made_up, save_captured  # noqa: E402
from penstock.benchmarks.sparse_run import Sample, contenders, run_case  # noqa: E402
from penstock.kernels.sparse.attention import logits  # noqa: E402
from penstock.kernels.sparse.config import SparseConfig  # noqa: E402


def small(level: str, seed: int, steps: int = 4) -> Layer:
    return made_up(level, seed, tokens=1200, steps=steps, heads=2, group=2, size=64)


def test_levels_differ_in_how_few_tokens_have_most_mass():
    needed = []
    for level in LEVELS:
        query, keys, _ = list(small(level, 0).steps())[-1]
        sums = logits(query, keys).softmax(-1).sort(-1, descending=True).values.cumsum(-1)
        needed.append((sums < 0.8).sum(-1).float().mean().item())
    assert needed[0] > 2 * needed[1] > 4 * needed[2]


def test_each_step_sees_one_token_more_and_halves_are_the_whole():
    layer = small("mid", 0)
    assert [keys.shape[1] for _, keys, _ in layer.steps()] == [1197, 1198, 1199, 1200]
    assert layer.prompt == 1196
    first, second = layer.halves()
    both = [*first.steps(), *second.steps()]
    for (query, keys, _), (other, others, _) in zip(both, layer.steps(), strict=True):
        assert torch.equal(query, other)
        assert torch.equal(keys, others)


def test_keys_are_the_same_for_the_same_seed_and_others_for_another():
    assert torch.equal(small("flat", 3).keys, small("flat", 3).keys)
    assert not torch.equal(small("flat", 3).keys, small("flat", 4).keys)


def test_captured_layers_come_back_and_shapes_that_do_not_fit_are_named(tmp_path):
    layer = small("mid", 1)
    file = tmp_path / "layers.npz"
    save_captured(file, [layer])
    (found,) = load_captured(file)
    assert found.name == "mid"
    assert torch.equal(found.keys, layer.keys)
    save_captured(file, [Layer("bad", layer.queries, layer.keys[:, :, :32], layer.values)])
    with pytest.raises(ValueError, match="'bad' has"):
        load_captured(file)


def test_a_case_measures_every_contender_and_its_margins_are_learned(monkeypatch):
    config = SparseConfig(recent_tokens=16, segment_tokens=2048)
    case = run_case("mid", config, [small("mid", 0)], [small("mid", 1, steps=2)], lambda text: None)
    entries = contenders(config)
    rows = promise_rows(case, entries)
    assert {row["selector"] for row in rows} == {one.selector.name for one in entries} - {"quest"}
    for row in rows:
        if row["selector"] == "oracle":
            assert row["attained"] == 1
            assert row["to oracle"] == 1
    ours = case.samples["hybrid", 0.9, True]
    assert len(ours.masses) == 2 * 2 * 2
    assert len(ours.tokens) == 2 * 2
    assert case.calibration("hybrid", 0.9).attained(0) is not None
    budgets = budget_rows(case, entries)
    assert [row["mass"] for row in budgets] == list(sparse_run.MASSES)
    names = [claim.name for claim in claims(rows, budgets)]
    assert len(names) == 4 + 3


def test_an_error_between_two_budgets_is_on_the_line_between_them():
    points = [Sample([0.01], [], [0.4], []), Sample([0.16], [], [0.1], [])]
    assert error_at(points, 0.04) == pytest.approx(0.2)
    assert error_at(points, 0.5) == pytest.approx(0.1)
    assert error_at(points, 0.001) == pytest.approx(0.4)


def test_quantiles_and_shares_of_a_sample():
    sample = Sample(masses=[0.5, 0.9, 0.8, 0.7])
    assert sample.kept(0.8) == 0.5
    assert sample.quantile(0.0) == 0.5
    assert sample.quantile(0.5) == 0.8
    assert math.isclose(sample.quantile(0.99), 0.9)
