"""Look-ups of prefix hits: how many there are, whose, and that everybody's turn comes."""

from __future__ import annotations

import random

import pytest

from penstock.schedulers.client_queue import Entry
from penstock.schedulers.dlpm import DeficitOrder
from penstock.schedulers.lpm import PrefixOrder
from penstock.schedulers.prefix_hits import Relatives, sample
from penstock.schedulers.ranked import RECHECKS, REFRESH_S, REPAID_STEPS
from penstock.schedulers.waiting import Job


class Cache:
    """Hits by request id, and a record of who asked."""

    def __init__(self):
        self.hit = {}
        self.asked = []

    def __call__(self, request_id):
        self.asked.append(request_id)
        return self.hit.get(request_id, 0)


def make_order(cache, **options):
    return PrefixOrder(clock=lambda: 0.0, hit_tokens=cache, **{"ageing_tokens_per_s": 0.0, **options})


def chain(*parts):
    """Chained hashes of 8 blocks a part."""
    return tuple((*parts[: block // 8 + 1], block) for block in range(8 * len(parts)))


def test_samples_are_at_powers_of_four():
    assert sample(()) == ()
    assert sample("abcdefghijklmnopqr") == ("a", "d", "p")
    assert sample("abcd") == ("a", "d")
    assert sample("abc") == ("a",)
    assert sample("aaaa") == ("a",)


@pytest.mark.parametrize("per_step", [0, 1, 2, 7, 64])
def test_look_ups_are_bounded_a_step_and_a_pick(per_step):
    rng = random.Random(per_step)
    cache = Cache()
    order = make_order(cache, refreshes_per_step=per_step)
    for number in range(1000):
        cache.asked.clear()
        job = Job(f"r{number}", rng.choice("abc"), 999, 0.0, chain(rng.choice("xyz"), rng.choice("xyz")))
        cache.hit[job.request_id] = rng.randrange(1000)
        order.add(job)
        assert cache.asked == []
        if number % 3 == 0:
            for waiting in list(cache.hit):
                cache.hit[waiting] = rng.randrange(1000)
            order.begin_step()
            assert len(cache.asked) == len(set(cache.asked)) <= per_step
            cache.asked.clear()
            cache.hit.pop(order.pop().request_id)
            assert len(cache.asked) <= RECHECKS
            cache.asked.clear()
    order.check_integrity()


def test_relatives_of_what_is_served_are_looked_up_next_the_closest_first():
    cache = Cache()
    order = make_order(cache, refreshes_per_step=64)
    order.add(Job("served", "ada", 999, 0.0, chain("doc", "a")))
    order.begin_step()
    for number in range(400):
        order.add(Job(f"stranger{number}", "ada", 999, 1.0, chain(f"s{number}", "a")))
    for number in range(3):
        order.add(Job(f"cousin{number}", "ada", 999, 1.0, chain("doc", f"c{number}")))
    order.add(Job("twin", "ada", 999, 1.0, chain("doc", "a")))
    assert order.pop().request_id == "served"
    order.begin_step()
    cache.asked.clear()
    order.begin_step()
    assert not {"twin", "cousin0", "cousin1", "cousin2"} & set(cache.asked)
    order.add(Job("served", "ada", 999, -1.0, chain("doc", "a")))
    assert order.pop().request_id == "served"
    cache.asked.clear()
    order.begin_step()
    relatives = [name for name in cache.asked if not name.startswith("stranger")]
    assert relatives[0] == "twin"
    assert set(relatives[:4]) == {"twin", "cousin0", "cousin1", "cousin2"}
    assert set(cache.asked[:8]) >= set(relatives[:4])


def test_relatives_take_turns_when_there_are_more_than_a_pick_can_name():
    index = Relatives()
    served, *others = (
        Entry(Job(f"r{number}", "ada", 999, 0.0, chain("doc", f"p{number}")), None, number)
        for number in range(41)
    )
    for entry in (served, *others):
        index.add(entry)
    index.remove(served)
    seen = [entry for _ in range(10) for entry in index.of(served.samples, 4)]
    assert sorted(entry.sequence for entry in seen) == [entry.sequence for entry in others]


def test_the_index_of_relatives_finds_those_of_the_longest_shared_sample():
    rng = random.Random(2)
    index, waiting = Relatives(), {}
    for number in range(2000):
        if waiting and rng.random() < 0.45:
            gone = waiting.pop(rng.choice(list(waiting)))
            index.remove(gone)
            shared = {
                entry.sequence: sum(key in entry.samples for key in gone.samples)
                for entry in waiting.values()
            }
            found = [entry.sequence for entry in index.of(gone.samples, 5)]
            assert len(found) == len(set(found))
            closest = sorted((depth for depth in shared.values() if depth), reverse=True)
            assert [shared[sequence] for sequence in found][:1] == closest[:1]
            assert all(shared[sequence] for sequence in found)
        else:
            parts = [rng.choice("ab") for _ in range(rng.randrange(1, 6))]
            entry = Entry(Job(f"r{number}", "ada", 999, 0.0, chain(*parts)), None, number)
            waiting[number] = entry
            index.add(entry)
        if number % 50 == 0:
            index.check_integrity(list(waiting.values()))


def test_everybody_is_looked_up_again_within_a_round_however_much_is_served():
    cache = Cache()
    order = make_order(cache, refreshes_per_step=8)
    for number in range(60):
        order.add(Job(f"cold{number}", "ada", 999, 0.0, chain(f"c{number}")))
    for number in range(200):
        order.add(Job(f"hot{number}", "ada", 999, -1.0, chain("hot")))
    for _ in range(60):
        order.begin_step()
    cache.asked.clear()
    for number in range(260 // 2 + 1):
        order.begin_step()
        order.pop()
        order.add(Job(f"more{number}", "ada", 999, -1.0, chain("hot")))
    assert {f"cold{number}" for number in range(60)} <= set(cache.asked)


def test_a_head_whose_prefix_was_evicted_gives_way():
    cache = Cache()
    order = make_order(cache, refreshes_per_step=64)
    for name, hit in (("long", 900), ("longer", 950), ("short", 300)):
        cache.hit[name] = hit
        order.add(Job(name, "ada", 999, 0.0))
    order.begin_step()
    assert order.peek().request_id == "longer"
    cache.hit.update(long=0, longer=0)
    order._look_ups._per_step = 0
    order.begin_step()
    assert order.peek().request_id == "short"


def test_a_prefix_that_grows_after_arrival_does_not_confuse_the_index():
    """An engine appends hashes of generated blocks to the list it gave."""
    cache = Cache()
    order = make_order(cache)
    hashes = list(chain("a"))
    order.add(Job("r", "ada", 999, 0.0, hashes))
    hashes.extend(f"output{block}" for block in range(20))
    order.check_integrity()
    assert order.pop().request_id == "r"
    order.check_integrity()


def test_the_head_of_the_unnamed_competes_by_its_hit():
    cache = Cache()
    order = DeficitOrder(clock=lambda: 0.0, hit_tokens=cache, ageing_tokens_per_s=0.0)
    cache.hit.update(u0=700, u1=0, a=500)
    order.add(Job("u0", "", 999, 0.0))
    order.add(Job("u1", "", 999, 0.0))
    order.add(Job("a", "ada", 999, 0.0))
    order.begin_step()
    assert [order.pop().request_id for _ in range(3)] == ["u0", "a", "u1"]


def test_steps_without_time_still_look_up_newcomers_and_everybody_between_relatives():
    """Look-ups take longer than steps have time for, and each step serves a request with many relatives."""
    now = [0.0]
    asked = []

    def slow(request_id):
        asked.append(request_id)
        now[0] += 1.0
        return 0

    order = PrefixOrder(clock=lambda: now[0], hit_tokens=slow, idle_s=1e9)
    for number in range(300):
        order.add(Job(f"hot{number}", "ada", 999, 0.0, chain("hot")))
    for _ in range(1200 * (1 + REPAID_STEPS)):
        order.begin_step()
    order.add(Job("new", "ada", 999, 1.0, chain("new")))
    asked.clear()
    for _ in range(4 * (1 + REPAID_STEPS)):
        order.pop()
        order.begin_step()
    assert "new" in asked


@pytest.mark.parametrize(("each_us", "most"), [(50, 1), (21, 1), (14, 2), (9, 3)])
def test_look_ups_take_the_time_of_a_step_in_the_mean(each_us, most):
    now = [0]
    made = []

    def slow(request_id):
        now[0] += each_us
        made[-1] += 1
        return 0

    order = PrefixOrder(clock=lambda: now[0] * 1e-6, hit_tokens=slow)
    for number in range(200):
        order.add(Job(f"r{number}", "ada", 999, 0.0))
    for _ in range(80):
        made.append(0)
        order.begin_step()
    assert max(made) == most
    assert abs(sum(made) * each_us - 80 * 1e6 * REFRESH_S) <= 2 * each_us
    assert order.peek().request_id
