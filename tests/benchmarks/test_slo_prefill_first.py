"""The baseline that computes prompts before anybody decodes."""

from __future__ import annotations

from penstock.benchmarks.slo_prefill_first import PrefillFirst
from penstock.schedulers.slo.requests import Limits, Running, Waiting

LIMITS = Limits(step_tokens=1000, running_requests=8)
DECODE = Running(request_id="d", arrival_s=0.0, tokens=11, computed_tokens=10, output_tokens=1)


def test_nobody_decodes_while_a_prompt_can_be_computed():
    policy = PrefillFirst()
    policy.arrive(Waiting("a", "", 700, 0.0))
    policy.arrive(Waiting("b", "", 700, 0.1))
    plan = policy.plan(1.0, [DECODE], 10_000, LIMITS)
    assert (plan.caps, plan.waiting) == ({"a": 700, "b": 300}, ("a", "b"))


def test_decodes_run_where_no_prompt_waits_or_none_fits():
    policy = PrefillFirst()
    assert not policy.plan(1.0, [DECODE], 10_000, LIMITS).active
    policy.arrive(Waiting("a", "", 700, 0.0))
    assert not policy.plan(1.0, [DECODE], 600, LIMITS).active
