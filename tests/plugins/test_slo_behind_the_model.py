"""What is put off until the model computes is done once, and the step that was laid out there is the one that
would have been planned; whatever ends, arrives or is set back in between, and whether the engine asks or not.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm")

from slo_traffic import Time, TimedStepper, kind_of, ours, settings_of, slo_request, traffic
from stepped_scheduler import Settings, build

from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.profiles import Profile
from penstock.schedulers.slo.step_time import StepTimeModel

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
FIXED_S, TOKEN_S = 0.02, 5e-5


class Counted:
    """Counts what the planner is told, and the plans that were laid out."""

    def __init__(self, scheduler: Any) -> None:
        self.arrivals: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.learned = self.laid_out = self.anew = 0
        planner = scheduler.planner
        self._methods = planner.arrive, planner.leave, planner.observe_step, planner.complete
        planner.arrive, planner.leave = self._arrive, self._leave
        planner.observe_step, planner.complete = self._learn, self._complete
        anew = scheduler._plan_anew

        def plan_anew(*args: Any) -> Any:
            self.anew += 1
            return anew(*args)

        scheduler._plan_anew = plan_anew

    def _arrive(self, job: Any) -> None:
        self.arrivals[job.request_id] += 1
        self._methods[0](job)

    def _leave(self, name: str) -> None:
        self.ends[name] += 1
        self._methods[1](name)

    def _learn(self, *args: Any) -> None:
        self.learned += 1
        self._methods[2](*args)

    def _complete(self, *args: Any) -> Any:
        plan = self._methods[3](*args)
        self.laid_out += plan is not None
        return plan


def aborting(scheduler: Any, seed: int, asked: float) -> Any:
    """Abort some while a step is in flight, before the engine asks, which it does so often."""
    rng = random.Random(f"asks {seed}")

    def asks() -> bool:
        if scheduler.requests and rng.random() < 0.1:
            name = rng.choice(list(scheduler.requests))
            scheduler.finish_requests(name, type(scheduler.requests[name].status).FINISHED_ABORTED)
        return rng.random() < asked

    return asks


@BOTH
@pytest.mark.parametrize("asked", [0.0, 0.5, 1.0])
def test_what_is_put_off_is_done_once_however_often_the_engine_asks(is_async, asked):
    laid_out = 0
    for seed in range(4):
        time = Time()
        scheduler = build(settings_of(seed, is_async), kind_of(is_async, seed), clock=time, wall_clock=time)
        counted = Counted(scheduler)
        asks = aborting(scheduler, seed, asked)
        stepper, sent = traffic(scheduler, seed, is_async, targets=1.0, time=time, asks=asks)
        scheduler.check_integrity()
        names = dict.fromkeys((one.request_id for one in sent), 1)
        assert counted.ends == names
        # One that was aborted at the door was never known.
        assert counted.arrivals.items() <= names.items()
        assert all(one.request_id in counted.arrivals for one in sent if one.num_output_tokens)
        assert counted.learned == stepper.computed_steps
        assert not len(scheduler._later)
        assert not scheduler.waiting.arrivals
        assert not len(scheduler.records)
        laid_out += counted.laid_out
    assert (laid_out > 20) == (asked > 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_step_that_was_laid_out_is_the_step_that_is_planned_when_it_begins(seed):
    """Where steps take as long as predicted and requests end where they said."""
    found = []
    for asked in (True, False):
        time, rng = Time(), random.Random(seed)
        planner = Planner(ours().planner.config, StepTimeModel(Profile(base_s=FIXED_S, token_s=TOKEN_S)))
        scheduler = ours(Settings(blocks=400, budget=256, seqs=8), time, planner=planner)
        counted = Counted(scheduler)
        stepper = TimedStepper(scheduler, time, fixed_s=FIXED_S, token_s=TOKEN_S)
        stepper.asks = lambda asked=asked: asked
        for number in range(30):
            ttft_ms, tpot_ms = rng.choice(((300, 60), (1_000, 100), (5_000, 40)))
            prompt = [number * 1_000 + n for n in range(rng.randrange(10, 300))]
            sample = slo_request(f"r{number}", 0, rng.randrange(2, 40), ttft_ms, tpot_ms, tokens=prompt)
            sample.arrival_time = time.now
            scheduler.add_request(sample)
            for _ in range(rng.randrange(4)):
                stepper.step()
        stepper.drain()
        found.append(stepper.steps)
        assert (counted.laid_out > 20) == asked
    assert found[0] == found[1]


@BOTH
def test_who_comes_back_under_an_id_that_has_just_ended_is_served(is_async):
    time = Time()
    scheduler = ours(Settings(blocks=400, is_async=is_async), time)
    stepper = TimedStepper(scheduler, time, depth=1 + is_async)
    counted = Counted(scheduler)
    scheduler.add_request(slo_request("stays", 40, output=60))
    for _ in range(4):
        again = slo_request("again", 40, output=50)
        again.arrival_time = time.now
        scheduler.add_request(again)
        for _ in range(5):
            stepper.step()
        assert again in scheduler.running
        stepper.abort("again")
    stepper.drain()
    assert (counted.arrivals["again"], counted.ends["again"]) == (4, 4)
    scheduler.check_integrity()


@BOTH
def test_while_few_wait_an_arrival_is_served_in_the_step_that_comes_next(is_async):
    time = Time()
    scheduler = ours(Settings(blocks=400, budget=256, is_async=is_async), time)
    stepper = TimedStepper(scheduler, time, depth=1 + is_async)
    scheduler.add_request(slo_request("runs", 40, output=60))
    for _ in range(5):
        stepper.step()
    counted = Counted(scheduler)
    scheduler.add_request(slo_request("new", 40))
    assert "new" in stepper.step().num_scheduled_tokens
    assert (counted.laid_out, counted.anew) == (1, 0)


def test_who_arrives_at_a_long_line_is_heard_of_behind_the_model():
    time = Time()
    scheduler = ours(Settings(seqs=2, blocks=400), time)
    stepper = TimedStepper(scheduler, time)
    for number in range(40):
        scheduler.add_request(slo_request(f"r{number}", 20, output=30, ttft_ms=60_000.0))
    stepper.step()
    counted = Counted(scheduler)
    heard = []
    stepper.asks = lambda: heard.append(counted.arrivals["new"]) or True
    scheduler.add_request(slo_request("new", 20))
    stepper.step()
    assert heard == [0]
    assert counted.arrivals["new"] == 1
    aborted = slo_request("aborted", 20)
    scheduler.add_request(aborted)
    stepper.abort("aborted")
    stepper.drain()
    assert counted.arrivals["aborted"] == 0
    scheduler.check_integrity()


@BOTH
def test_nothing_laid_out_outlives_a_batch_that_is_thrown_out(is_async):
    time = Time()
    scheduler = ours(Settings(blocks=400, is_async=is_async), time)
    stepper = TimedStepper(scheduler, time, depth=1 + is_async)
    for number in range(4):
        scheduler.add_request(slo_request(f"r{number}", 40, output=30))
    for _ in range(6):
        stepper.step()
    counted = Counted(scheduler)
    while stepper.in_flight:
        stepper.receive()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    stepper.step()
    assert (counted.laid_out, counted.anew) == (0, 1)
    stepper.drain()
