"""What the bench of sparse decode claims of its rows."""

from __future__ import annotations

from penstock.benchmarks.sparse_build import build_claims
from penstock.benchmarks.sparse_kernel import BUDGET, claims
from penstock.kernels.sparse.serving import ServingConfig

ACTIVE = ServingConfig().least_tokens


def row(tokens: int, dense: float, sparse: float, attained: float = 1.0, **keys):
    return {
        "tokens": tokens,
        "budget": None,
        "dense ms": dense,
        "choice ms": 0.1,
        "speed": dense / sparse,
        "mean to dense": sparse / dense,
        "attained": attained,
        **keys,
    }


def test_claims_are_of_lengths_that_are_sparse_by_default_but_for_the_mass():
    rows = [
        row(ACTIVE // 4, 1.0, 9.0, 0.97),
        row(2 * ACTIVE + 1, 10.0, 10.2),
        row(32768, 30.0, 20.0),
        row(32768, 30.0, 5.0, 0.2, budget=BUDGET),
    ]
    found = list(claims(rows))
    assert [claim.value for claim in found] == [10.2 / 10.0, 0.97, 6.0, 0.1 / 30]
    assert all(claim.holds for claim in found)


def test_one_slow_or_short_row_breaks_a_claim():
    fixed = {"budget": BUDGET, "choice ms": 3.0}
    rows = [row(16384, 30.0, 31.0, 0.9), *(row(32768, 30.0, time, **fixed) for time in (5.0, 7.0))]
    assert [claim.holds for claim in claims(rows)] == [False, False, False, False]


def test_building_is_held_to_the_goal_of_its_length():
    rows = [{"tokens": tokens, "index to prefill": 0.05} for tokens in (8192, 32768)]
    assert [claim.holds for claim in build_claims(rows)] == [True, False]
