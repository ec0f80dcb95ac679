"""What the bench of shared prefixes says of its steps and its pairs of servers."""

from __future__ import annotations

import pytest

from penstock.benchmarks.decode_pairs import Decoded
from penstock.benchmarks.shared_prefix_kernel import Case, Timed, cases, claims
from penstock.benchmarks.shared_prefix_served import Case as Served
from penstock.benchmarks.shared_prefix_served import claims as served_claims


def timed(samples: int, prefix: int, stock: float, ours: float) -> Timed:
    return Timed(Case(samples, prefix, 64, 3), [stock] * 3, [ours, ours, 100.0], [0.1] * 3, True)


def test_the_worst_case_is_named_and_speeds_are_of_many_samples_alone():
    found = claims([timed(2, 8192, 4.0, 5.0), timed(8, 8192, 9.0, 3.0), timed(16, 8192, 8.0, 4.0)])
    assert [(claim.value, claim.holds) for claim in found] == [(1.25, False), (2.0, True)]
    assert "2 samples of 8,192 tokens" in found[0].name


def test_shapes_that_share_nothing_are_among_those_that_must_not_be_slower():
    every = cases(quick=False)
    assert any(case.prefix == 0 for case in every)
    assert {case.samples for case in every if case.prefix == 32768} == {2, 8, 16, 64}


def test_a_served_case_compares_tokens_a_second_and_cpu_time_both_ways():
    stock, ours = [Decoded(10.0, 30.0)] * 2, [Decoded(20.0, 20.0)] * 2
    case = Served(2048, stock, ours, 0.8)
    assert case.cells()["tok/s times"] == 2.0
    assert [claim.value for claim in served_claims([case])] == [2.0, 1.5]


def test_a_step_of_a_small_case_is_timed_both_ways(monkeypatch):
    pytest.importorskip("vllm")
    pytest.importorskip("numba")
    from penstock.benchmarks import shared_prefix_kernel
    from penstock.patches.vllm.builds import is_cpu_build
    from penstock.plugins.vllm.shared_prefix import enable

    if not is_cpu_build():
        pytest.skip("needs vLLM's CPU kernels")
    enable()
    monkeypatch.setattr(shared_prefix_kernel, "COLD_BYTES", 1)
    run_case = shared_prefix_kernel.run_case
    found = run_case(Case(3, 256, 40, 1, block_tokens=32), 0)
    assert found.shared
    assert len(found.stock) == len(found.ours) == 1
    assert not run_case(Case(2, 0, 40, 1, block_tokens=32), 0).shared
