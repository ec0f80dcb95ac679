"""A watch on vLLM's scheduler: its steps stay stock's, and what they held and took is written down."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from slo_traffic import Time, TimedStepper, settings_of, traffic
from stepped_scheduler import Settings, build, request
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from penstock.plugins.vllm.step_watch import watched_scheduler
from penstock.schedulers.slo.step_time import StepFeatures

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@BOTH
def test_every_step_is_stocks_and_is_seen_once(is_async):
    stock, _ = traffic(
        build(settings_of(3, is_async), AsyncScheduler if is_async else Scheduler), 3, is_async, targets=0.0
    )
    watched, time = [], Time()
    scheduler = build(settings_of(3, is_async), watched_scheduler, watched=watched, clock=time)
    found, _ = traffic(scheduler, 3, is_async, targets=0.0, time=time, jumps=False)
    assert found.steps == stock.steps
    assert len(watched) == found.computed_steps
    assert all(step.seconds > 0 for step in watched)


@BOTH
def test_a_step_s_composition_and_time_are_its_own(is_async):
    watched, time = [], Time()
    scheduler = build(Settings(is_async=is_async), watched_scheduler, watched=watched, clock=time)
    stepper = TimedStepper(scheduler, time, 1 + is_async, fixed_s=0.02, token_s=1e-3)
    scheduler.add_request(request("r", [7] * 40, 3))
    stepper.drain()
    assert [step.features for step in watched] == [
        StepFeatures(40, 1, 0),
        StepFeatures(1, 1, 40),
        StepFeatures(1, 1, 41),
    ]
    assert [step.seconds for step in watched] == pytest.approx([0.06, 0.021, 0.021])
