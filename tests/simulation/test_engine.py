"""The virtual clock and the event loop, against closed forms."""

from __future__ import annotations

import math

import pytest
from scripted_engine import OneAtATime, ask

from penstock.simulation.engine import IDLE_TICK_S, MOST_IDLE_TICKS, Simulation, SimulationStall, VirtualClock
from penstock.simulation.records import Batch, Progress, Row, Served
from penstock.simulation.workloads import Fixed


def tenth_a_token(load):
    return 0.1 * (load.prefill_tokens + load.decode_tokens)


def run(asks, *, engine=None, step_time=tenth_a_token, **more):
    return Simulation(engine or OneAtATime(), Fixed(asks), step_time, **more).run()


def test_a_lone_request_takes_its_prompt_and_then_a_step_a_token():
    (served,) = run([ask("a", 2.0, prompt=20, output=3)]).served
    assert served.admitted_s == 2.0
    assert served.first_token_s == pytest.approx(4.0)
    assert list(served.token_times) == pytest.approx([4.0, 4.1, 4.2])
    assert served.finished_s == pytest.approx(4.2)
    assert served.ttft_s == pytest.approx(2.0)


def test_the_second_waits_for_the_first_and_an_idle_engine_jumps_to_the_next_arrival():
    result = run([ask("b", 1.0, prompt=10), ask("a", prompt=20), ask("late", 100.0, prompt=10)])
    a, b, late = result.served
    assert [one.ask.request_id for one in result.served] == ["a", "b", "late"]
    assert b.admitted_s == a.finished_s == pytest.approx(2.2)
    assert late.admitted_s == 100.0
    assert result.makespan_s == pytest.approx(101.2)
    assert result.steps == 9


def test_a_follow_up_arrives_when_its_parent_finishes():
    class Twice(Fixed):
        def follow(self, served):
            if served.ask.request_id == "again":
                return []
            return [ask("again", served.finished_s + 5, prompt=10)]

    result = Simulation(OneAtATime(), Twice([ask("first", prompt=20)]), tenth_a_token).run()
    first, again = result.served
    assert again.admitted_s == first.finished_s + 5


def test_the_clock_never_runs_backwards():
    clock = VirtualClock()
    clock.advance_to(1.0)
    for bad in (0.5, math.nan):
        with pytest.raises(ValueError):
            clock.advance_to(bad)
    assert clock() == 1.0


class Ahead(OneAtATime):
    """Chooses tokens whose predecessors are still being computed, and notes when."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.chosen, self.times = clock, {}, []

    def schedule(self):
        rows = []
        for one in self.queue:
            tokens = self.chosen.get(one.request_id, 0)
            if tokens < one.output_tokens:
                start = one.prompt_tokens + tokens - 1 if tokens else 0
                rows.append(Row(one.request_id, start, 1 if tokens else one.prompt_tokens))
                self.chosen[one.request_id] = tokens + 1
        self.times.append(self.clock())
        return Batch(rows, token={row.request_id: self.chosen[row.request_id] for row in rows})

    def complete(self, batch):
        progress = []
        for one in list(self.queue):
            if one.request_id in (batch.token or {}):
                finished = batch.token[one.request_id] == one.output_tokens
                progress.append(Progress(one.request_id, 1, finished))
                if finished:
                    self.queue.remove(one)
        return progress


def test_with_overlap_a_step_is_chosen_as_the_one_before_begins():
    clock = VirtualClock()
    engine = Ahead(clock)
    asks = [ask("a", output=4), ask("b", 0.5, output=2)]
    result = run(asks, engine=engine, step_time=lambda _: 1.0, clock=clock, overlap=True)
    a, b = result.served
    assert list(a.token_times) == [1.0, 2.0, 3.0, 4.0]
    # It comes while two steps are chosen already.
    assert (b.admitted_s, list(b.token_times)) == (2.0, [3.0, 4.0])
    assert engine.times[:4] == [0.0, 0.0, 1.0, 2.0]
    assert (result.steps, result.makespan_s, result.idle_ticks) == (4, 4.0, 0)


class Refuses(OneAtATime):
    """Schedules nothing until ``enough`` requests wait."""

    enough = 2

    def schedule(self):
        return super().schedule() if len(self.queue) >= self.enough or self.made else Batch([])


def test_a_stall_is_an_error_that_says_what_waits():
    with pytest.raises(SimulationStall, match=r"1 requests are unfinished .* 1 wait"):
        run([ask("a")], engine=Refuses())


def test_an_engine_that_waits_for_the_next_arrival_is_no_stall():
    class OnceTwoCame(Refuses):
        def schedule(self):
            batch = super().schedule()
            if batch.rows:
                self.enough = 1
            return batch

    result = run([ask("a"), ask("b", 50.0)], engine=OnceTwoCame())
    assert result.served[0].admitted_s == 50.0
    assert result.idle_ticks == MOST_IDLE_TICKS


def test_an_engine_that_waits_for_time_to_pass_gets_its_time():
    clock = VirtualClock()

    class After(OneAtATime):
        def schedule(self):
            return super().schedule() if clock() >= 0.0125 else Batch([])

    (served,) = run([ask("a")], engine=After(), clock=clock).served
    assert 0.0125 <= served.admitted_s <= 0.0125 + IDLE_TICK_S


def test_one_id_twice_is_refused():
    with pytest.raises(ValueError, match="two requests have the id 'a'"):
        run([ask("a"), ask("a", 1.0)])


def test_the_digest_tells_runs_apart_and_equal_runs_not():
    asks = [ask(str(n), n * 0.3) for n in range(5)]
    assert run(asks).digest() == run(asks).digest()
    assert run(asks).digest() != run(asks[:-1]).digest()
    assert run(asks).digest() != run(asks, step_time=lambda load: tenth_a_token(load) * (1 + 1e-15)).digest()


def test_observers_see_every_step_with_what_waits():
    seen = []

    class Watch:
        def stepped(self, step):
            seen.append((step.load.prefill_tokens, step.load.decode_tokens, dict(step.waiting)))

    run([ask("a", output=2, client="x"), ask("b", output=1, client="y")], observers=(Watch(),))
    assert seen == [(100, 0, {"x": 0, "y": 1}), (0, 1, {"x": 0, "y": 1}), (100, 0, {"x": 0, "y": 0})]


def served_of(prompt):
    return Served(ask("a", prompt=prompt), prompt)


def test_chunks_and_a_prefix_hit_make_up_the_prompt():
    served = served_of(100)
    assert served.compute(32, 40) == (40, 32)
    assert served.compute(72, 28) == (28, 0)
    assert served.compute(100, 1) == (0, 0)
    assert (served.extend_tokens, served.cached_tokens, served.recomputed_tokens) == (68, 32, 0)


@pytest.mark.parametrize(
    ("restart", "recomputed", "cached", "extend"),
    [(0, 60, 0, 100), (32, 28, 0, 100), (80, 0, 20, 80)],
    ids=["from the start", "with a hit of its own blocks", "with a hit beyond what it had"],
)
def test_after_a_preemption_nothing_counts_twice(restart, recomputed, cached, extend):
    served = served_of(100)
    served.compute(0, 60)
    served.compute(restart, 100 - restart)
    assert served.recomputed_tokens == recomputed
    assert (served.cached_tokens, served.extend_tokens) == (cached, extend)


def test_a_preempted_decode_recomputes_prompt_and_answer():
    served = served_of(100)
    served.compute(0, 100)
    for position in (100, 101):
        served.compute(position, 1)
    served.compute(0, 103)
    assert served.recomputed_tokens == 102
    assert served.extend_tokens == 100
