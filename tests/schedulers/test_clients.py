"""Who counts as a client: inventors of names, idle clients, and what is remembered of them."""

from __future__ import annotations

import random

import pytest

from penstock.schedulers.accounts import OTHERS
from penstock.schedulers.dlpm import DeficitOrder
from penstock.schedulers.lpm import PrefixOrder
from penstock.schedulers.vtc import CounterOrder
from penstock.schedulers.waiting import UNNAMED, Job

IDLE_S = 60.0
QUANTUM = 2000


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def dlpm(clock=None, **options):
    clock = clock or Clock()
    defaults = {"hit_tokens": lambda _: 0, "quantum_tokens": QUANTUM, "idle_s": IDLE_S}
    return DeficitOrder(clock=clock, **{**defaults, **options})


def vtc(clock=None, **options):
    return CounterOrder(clock=clock or Clock(), **{"idle_s": IDLE_S, **options})


def lpm(clock=None, **options):
    return PrefixOrder(clock=clock or Clock(), hit_tokens=lambda _: 0, **{"idle_s": IDLE_S, **options})


def clients(order):
    return {client.client: client for client in order.clients()}


def serve(order, client, tokens, request_id="served"):
    order.add(Job(request_id, client, tokens, 0.0))
    job = order.pop()
    order.charge_extend(job.client, tokens)
    assert job.client == client


def contest(order, *, inventive, each=1, rounds=3000, tokens=1000):
    """Service of an honest client and of a flooding one, with a request of 1000 tokens served a round;
    ``each`` requests of the flood bear one name."""
    had = {"honest": 0, "flood": 0}
    number = 0
    for _ in range(rounds):
        order.begin_step()
        for _ in range(3):
            number += 1
            name = f"flood{number // each}" if inventive else "flood"
            order.add(Job(f"f{number}", name, tokens, float(number)))
        order.add(Job(f"h{number}", "honest", tokens, float(number)))
        job = order.pop()
        had["honest" if job.client == "honest" else "flood"] += tokens
        order.charge_extend(job.client, tokens)
    return had


@pytest.mark.parametrize("make", [dlpm, vtc])
@pytest.mark.parametrize("newcomers", [1, 8])
def test_inventing_a_name_for_every_request_gains_the_share_of_the_newcomers_of_a_round(make, newcomers):
    """A new name has one request of less than a quantum a round, the account of the rest a quantum."""
    had = contest(make(newcomers_per_refill=newcomers), inventive=True)
    assert had["flood"] <= (newcomers + 1) * (had["honest"] + 2 * (QUANTUM + 1000))
    assert had["honest"] >= 3000 * 1000 / (newcomers + 2) - 2 * (QUANTUM + 1000)


@pytest.mark.parametrize("make", [dlpm, vtc])
def test_asking_twice_under_each_invented_name_gains_as_much_again(make):
    """The second request of a name that waits competes for the accounts that are kept for regular clients."""
    had = contest(make(newcomers_per_refill=4), inventive=True, each=2)
    assert had["flood"] <= (2 * 4 + 1) * (had["honest"] + 2 * (QUANTUM + 1000))


@pytest.mark.parametrize("make", [dlpm, vtc])
def test_a_listed_client_is_one_from_its_first_request_however_many_names_flood_in(make):
    order = make(newcomers_per_refill=0, max_clients=0, listed=["late"])
    for number in range(50):
        order.add(Job(f"f{number}", f"flood{number}", 1000, float(number)))
    for _ in range(20):
        job = order.pop()
        order.charge_extend(job.client, 1000)
        assert job.client != "late"
    order.add(Job("l0", "late", 1000, 60.0))
    order.add(Job("l1", "late", 1000, 61.0))
    served = []
    for _ in range(8):
        job = order.pop()
        order.charge_extend(job.client, 1000)
        served.append(job.client)
    assert served.count("late") == 2
    assert clients(order)["late"].extend_tokens == 2000
    order.check_integrity()


@pytest.mark.parametrize("make", [dlpm, vtc, lpm])
def test_a_listed_client_is_never_forgotten(make):
    clock = Clock()
    order = make(clock, **({} if make is lpm else {"listed": ["ada"]}))
    serve(order, "bob", 100)
    for _ in range(10):
        clock.now += 2 * IDLE_S
        order.begin_step()
    assert ("ada" in clients(order)) == (make is not lpm)
    assert "bob" not in clients(order) or make is vtc


@pytest.mark.parametrize("make", [dlpm, vtc])
def test_tenants_that_all_come_at_once_have_accounts_within_rounds(make):
    """With their requests waiting they compete for accounts with their like alone."""
    order = make(newcomers_per_refill=8)
    tenants = [f"t{number}" for number in range(40)]
    for number in range(3000):
        tenant = tenants[number % 40]
        order.add(Job(f"r{number}", tenant, 500, float(number)))
        if number % 2:
            job = order.pop()
            order.charge_extend(job.client, 500)
    assert set(tenants) <= clients(order).keys()


def test_the_share_of_one_client_is_half_here():
    had = contest(dlpm(), inventive=False)
    assert abs(had["honest"] - had["flood"]) <= 2 * (QUANTUM + 1000)


@pytest.mark.parametrize("make", [dlpm, vtc, lpm])
def test_names_beyond_the_limit_share_one_account_and_no_memory_grows(make):
    order = make(max_clients=5)
    for number in range(2000):
        order.add(Job(f"r{number}", f"c{number}", 100, 0.0))
        if number % 50 == 0:
            order.begin_step()
        job = order.pop()
        order.charge_extend(job.client, 100)
    shown = clients(order)
    assert len(shown) == 5 + 2
    assert shown[OTHERS].extend_tokens == (2000 - 5) * 100
    assert order._guests == {}
    order.check_integrity()


@pytest.mark.parametrize("make", [dlpm, vtc, lpm])
def test_the_unnamed_have_an_account_whatever_names_there_are(make):
    order = make(max_clients=0)
    order.add(Job("a", "ada", 100, 0.0))
    order.add(Job("u", UNNAMED, 100, 1.0))
    assert clients(order)[UNNAMED].waiting == 1
    assert clients(order)[OTHERS].waiting == 1


def test_a_name_that_gets_an_account_takes_along_what_it_has_waiting():
    order = dlpm(newcomers_per_refill=1)
    order.add(Job("first", "ada", 100, 0.0))
    for name in ("d0", "d1"):
        order.add(Job(name, "dan", 100, 0.0))
        assert (clients(order)[OTHERS].waiting == 0) == (name == "d1")
    for number in range(3):
        order.add(Job(f"b{number}", "bob", 100, 1.0 + number))
    assert clients(order)[OTHERS].waiting == 3
    assert order.pop().request_id == "first"
    order.add(Job("b3", "bob", 100, 9.0))
    assert clients(order)[OTHERS].waiting == 0
    assert clients(order)["bob"].waiting == 4
    order.check_integrity()
    assert [order.pop().request_id for _ in range(6)] == ["d0", "d1", "b0", "b1", "b2", "b3"]


def test_vtc_moves_guests_in_their_order_of_service():
    clock = Clock()
    order = vtc(clock, max_clients=1)
    order.add(Job("x", "xan", 1, 0.0))
    order.pop()
    for number in range(4):
        order.add(Job(f"a{number}", "ada", 1, float(number)))
    first, second = order.pop(), order.pop()
    order.put_back(second, preempted=False)
    order.put_back(first, preempted=False)
    clock.now = 2 * IDLE_S
    order.begin_step()
    order.add(Job("a4", "ada", 1, 5.0))
    assert clients(order)["ada"].waiting == 5
    assert [order.pop().request_id for _ in range(5)] == ["a0", "a1", "a2", "a3", "a4"]


@pytest.mark.parametrize("make", [dlpm, vtc, lpm])
def test_idle_clients_are_forgotten_and_what_they_had_still_counts(make):
    clock = Clock()
    order = make(clock)
    rng = random.Random(0)
    for number in range(40):
        serve(order, f"c{number}", rng.randrange(1, 900), f"r{number}")
    total = sum(c.extend_tokens for c in order.clients())
    for number in range(400):
        clock.now += IDLE_S / 10
        order.begin_step()
        serve(order, "ada", 1500, f"a{number}")
        order.check_integrity()
    assert clients(order).keys() == {UNNAMED, OTHERS, "ada"}
    assert sum(c.extend_tokens for c in order.clients()) == total + 400 * 1500


def test_a_client_that_waits_or_runs_is_not_forgotten():
    clock = Clock()
    order = dlpm(clock)
    order.add(Job("a", "ada", 100, 0.0))
    for _ in range(100):
        clock.now += IDLE_S / 2
        order.charge_output("bob", 1)
        order.begin_step()
    assert "ada" in clients(order)
    assert order.pop().client == "ada"
    order.charge_extend("ada", 10)
    for _ in range(100):
        clock.now += IDLE_S / 2
        order.charge_output("ada", 1)
        order.begin_step()
    assert clients(order)["ada"].output_tokens == 100


def test_a_debt_survives_idling_until_refills_have_paid_it():
    clock = Clock()
    order = dlpm(clock)
    serve(order, "ada", 5 * QUANTUM)
    for _ in range(10):
        clock.now += 2 * IDLE_S
        order.begin_step()
    debt = clients(order)["ada"].standing
    assert debt == -4 * QUANTUM
    order.add(Job("back", "ada", 100, clock.now))
    for number in range(4):
        order.add(Job(f"b{number}", "bob", QUANTUM, clock.now + number))
    for _ in range(4):
        job = order.pop()
        assert job.client == "bob"
        order.charge_extend("bob", QUANTUM)
    order.add(Job("late", "bob", QUANTUM, clock.now))
    # Both need a fifth refill now; the longer wait decides.
    assert order.pop().request_id == "back"


def test_a_counter_ahead_of_those_that_wait_survives_idling():
    clock = Clock()
    order = vtc(clock)

    def idle():
        for _ in range(10):
            clock.now += 2 * IDLE_S
            order.begin_step()

    order.add(Job("c", "cyd", 100, 9.0))
    serve(order, "ada", 5000)
    idle()
    assert clients(order)["ada"].standing == 5000
    order.charge_extend("cyd", 6000)
    idle()
    assert clients(order).keys() == {UNNAMED, OTHERS, "cyd"}


def test_a_client_that_stayed_away_saves_no_service_up_under_vtc():
    order = vtc()
    for number in range(20):
        serve(order, "ada", 1000, f"a{number}")
    order.add(Job("a", "ada", 1000, 0.0))
    order.add(Job("a'", "ada", 1000, 0.0))
    for number in range(10):
        order.add(Job(f"b{number}", "bob", 1000, 1.0))
    served = []
    for _ in range(4):
        job = order.pop()
        served.append(job.client)
        order.charge_extend(job.client, 1000)
    assert sorted(served) == ["ada", "ada", "bob", "bob"]


def test_being_passed_over_does_not_lift_a_counter():
    order = vtc()
    serve(order, "ada", 100)
    order.add(Job("b", "bob", 100, 0.0))
    job = order.pop()
    order.charge_extend("ada", 5000)
    order.add(Job("a", "ada", 100, 1.0))
    before = clients(order)["bob"].standing
    order.put_back(job, preempted=False)
    assert clients(order)["bob"].standing == before
    assert order.peek() == job


@pytest.mark.parametrize("make", [dlpm, vtc, lpm])
def test_a_running_request_of_a_forgotten_client_is_charged_to_the_others(make):
    order = make()
    order.charge_extend("gone", 100)
    order.charge_output("gone", 7)
    shown = clients(order)
    assert (shown[OTHERS].extend_tokens, shown[OTHERS].output_tokens) == (100, 7)
    assert "gone" not in shown
