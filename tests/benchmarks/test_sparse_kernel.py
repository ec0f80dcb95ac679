"""What the bench of sparse decode claims of its rows."""

from __future__ import annotations

from penstock.benchmarks.sparse_kernel import claims
from penstock.kernels.sparse.serving import ServingConfig

ACTIVE = ServingConfig().least_tokens


def row(tokens: int, dense: float, sparse: float, attained: float = 1.0):
    return {
        "tokens": tokens,
        "dense ms": dense,
        "sparse ms": sparse,
        "speed": dense / sparse,
        "attained": attained,
    }


def test_claims_are_of_lengths_that_are_sparse_by_default_but_for_the_mass():
    rows = [row(ACTIVE // 4, 1.0, 9.0, 0.97), row(2 * ACTIVE + 1, 10.0, 10.2), row(32768, 30.0, 5.0)]
    found = {claim.name: claim for claim in claims(rows)}
    worst, mass, speed = found.values()
    assert (worst.value, worst.holds) == (10.2 / 10.0, True)
    assert (mass.value, mass.holds) == (0.97, True)
    assert (speed.value, speed.holds) == (6.0, True)


def test_one_slow_or_short_row_breaks_a_claim():
    rows = [row(32768, 30.0, 31.0), row(65536, 60.0, 6.0, 0.9)]
    assert [claim.holds for claim in claims(rows)] == [False, False, False]
