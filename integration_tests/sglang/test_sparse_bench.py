"""The bench times what it says: the same layer through SGLang's backend, through ours, and through ours over
every page."""

from __future__ import annotations

import msgspec
import pytest

from penstock.benchmarks import sglang_sparse
from penstock.benchmarks.sparse_keys import made_up

TOKENS = 600


def test_a_case_reads_less_where_it_may_and_everything_where_it_must(monkeypatch):
    monkeypatch.setattr(sglang_sparse, "COLD_BYTES", 1)
    for name in ("SPARSE", "EVERY_PAGE"):
        short = msgspec.structs.replace(getattr(sglang_sparse, name), least_tokens=64, most_share=1.0)
        monkeypatch.setattr(sglang_sparse, name, short)
    steps = sglang_sparse.LEARNING + sglang_sparse.STEPS
    layer = made_up("peaky", seed=0, tokens=TOKENS + steps, steps=steps, heads=sglang_sparse.HEADS)
    stands = sglang_sparse.Stands(layer, 16)
    for backend in (stands.sparse, stands.every):
        stands.step(backend, 0)
    (sparse,), (every,) = (
        backend.worker.stats.snapshot().layer_pages.values() for backend in (stands.sparse, stands.every)
    )
    assert every[0] == every[1] == sparse[1] == sglang_sparse.HEADS * (TOKENS // 16 + 1)
    assert sparse[0] < sparse[1]
    row = sglang_sparse.run_case("peaky", layer, 16)
    assert row["tokens"] == TOKENS
    assert row["pages read"] < 1
    assert row["mass P10"] > 0.5


@pytest.mark.parametrize(("share", "holds"), [(1.0, True), (1.2, False)])
def test_the_claim_fails_where_it_should(share: float, holds: bool):
    rows = [{"mean to dense": 0.1}, {"mean to dense": share}]
    assert [claim.holds for claim in sglang_sparse.claims(rows)] == [holds]
