"""What DLPM promises beyond equality with the paper's algorithm: bounds, limits and shares."""

from __future__ import annotations

import math
import random
from types import MappingProxyType

import pytest

from penstock.schedulers.accounts import OTHERS
from penstock.schedulers.dlpm import DeficitOrder
from penstock.schedulers.lpm import PrefixOrder
from penstock.schedulers.waiting import UNNAMED, Job

QUANTUM = 2000


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def make_order(**options):
    defaults = {"clock": Clock(), "hit_tokens": lambda _: 0, "quantum_tokens": QUANTUM}
    return DeficitOrder(**{**defaults, **options})


def clients(order):
    return {client.client: client for client in order.clients()}


def test_deficits_stay_between_the_running_tokens_and_the_quantum():
    rng = random.Random(1)
    weights = {"ada": 0.5, "bob": 1.0, "cyd": 3.0, UNNAMED: 1.0}
    order = make_order()
    running = []
    lowest = dict.fromkeys(weights, 0.0)
    longest, batch, most_output = 1500, 8, 40
    worst_case = batch * (longest + 2 * most_output)
    for number in range(6000):
        name = rng.choice(list(weights))
        order.add(Job(f"r{number}", name, longest, number / 10, weight=weights[name]))
        if len(running) < batch:
            job = order.pop()
            order.charge_extend(job.client, rng.randrange(1, longest + 1))
            running.append([job, rng.randrange(1, most_output)])
        for one in running:
            order.charge_output(one[0].client, 1)
            one[1] -= 1
        running = [one for one in running if one[1] > 0]
        for client in order.clients():
            if client.client != OTHERS:
                lowest[client.client] = min(lowest[client.client], client.standing)
                assert -worst_case < client.standing <= QUANTUM * weights[client.client]
    assert all(level < 0 for level in lowest.values())


def largest_gap(order, *, requests, slots, prompt, output):
    """Range of the difference of service between two clients that always wait, on an engine of so many slots
    that generates a token a step for each."""
    for number in range(requests):
        for name in ("ada", "bob"):
            order.add(Job(f"{name}{number}", name, prompt, number / 10))
    running, difference = [], [0.0]
    while all(clients(order)[name].waiting >= slots for name in ("ada", "bob")):
        order.begin_step()
        while len(running) < slots:
            client = order.pop().client
            order.charge_extend(client, prompt)
            running.append([client, order.reserve_output(client, 0, 1000), 0])
        for one in running:
            order.charge_output(one[0], 1, min(1, one[1]))
            one[1], one[2] = max(0, one[1] - 1), one[2] + 1
        for client, reserved, _ in [one for one in running if one[2] == output]:
            order.release_output(client, reserved)
            order.observe_output(client, output)
        running = [one for one in running if one[2] < output]
        difference.append(clients(order)["ada"].service - clients(order)["bob"].service)
    return max(difference) - min(difference)


def test_charging_expected_output_ahead_keeps_a_client_from_filling_the_batch():
    """Ada's prefixes are warm and her prompts short: a quantum would admit a batch of hers before the first
    generated token is charged."""
    run = {"requests": 200, "slots": 32, "prompt": 20, "output": 60}
    hits = {"hit_tokens": lambda request_id: 1000 if request_id.startswith("ada") else 0}
    as_it_comes = largest_gap(make_order(first_output_tokens=0, **hits), **run)
    assert largest_gap(make_order(**hits), **run) <= 2 * QUANTUM < as_it_comes


def test_output_that_does_not_come_is_given_back_up_to_a_quantum_and_pays_for_what_comes_next():
    order = make_order(first_output_tokens=3000)
    for number in range(3):
        order.add(Job(f"r{number}", "ada", 10, 0.0))
    order.pop()
    order.charge_extend("ada", 10)
    assert order.reserve_output("ada", 0, 9999) == 3000
    assert clients(order)["ada"].standing == QUANTUM - 10 - 6000
    order.pop()
    assert clients(order)["ada"].standing == 4 * QUANTUM - 10 - 6000
    order.release_output("ada", 3000)
    assert clients(order)["ada"].standing == QUANTUM
    order.charge_extend("ada", 5900)
    assert clients(order)["ada"].standing == QUANTUM
    order.charge_extend("ada", 190)
    assert clients(order)["ada"].standing == QUANTUM - 100
    assert clients(order)["ada"].service == 6100


def test_requests_of_the_shared_account_reserve_nothing():
    order = make_order(max_clients=0)
    assert order.reserve_output("ada", 0, 9999) == 0


def test_service_follows_the_weights_of_backlogged_clients():
    order = make_order()
    weights = {"ada": 1.0, "bob": 2.0, "cyd": 4.0}
    for number in range(3000):
        for name, weight in weights.items():
            order.add(Job(f"{name}{number}", name, 500, number / 10, weight=weight))
    for _ in range(3000):
        order.charge_extend(order.pop().client, 500)
    service = {name: clients(order)[name].service / weight for name, weight in weights.items()}
    assert max(service.values()) - min(service.values()) <= 2 * QUANTUM + 500


def test_a_refund_after_refills_leaves_the_deficit_as_if_nothing_had_been_charged():
    order = make_order()
    for number in range(5):
        order.add(Job(f"r{number}", "ada", 3000, 0.0))
    assert order.pop()
    order.charge_extend("ada", 700)
    before = clients(order)["ada"].standing
    order.charge_extend("ada", 9000)
    assert order.pop()
    assert clients(order)["ada"].standing == 9000 // QUANTUM * QUANTUM + before - 9000 + (
        0 if before > 9000 % QUANTUM else QUANTUM
    )
    order.charge_extend("ada", -9000)
    assert clients(order)["ada"].standing == before
    assert clients(order)["ada"].service == 700


@pytest.mark.parametrize("ageing", [0.0, 32.0])
def test_without_end_of_the_quantum_dlpm_is_lpm(ageing):
    """From the first refill on: a client that comes later has no credit before the next one."""
    rng = random.Random(5)
    hit = {}
    options = {"hit_tokens": hit.__getitem__, "ageing_tokens_per_s": ageing, "refreshes_per_step": 200}
    dlpm = make_order(quantum_tokens=1e15, **options)
    lpm = PrefixOrder(clock=Clock(), **options)
    names = (UNNAMED, "ada", "bob", "cyd")
    running = []
    for number in range(4000):
        if number % 20 == 0:
            dlpm.begin_step()
            lpm.begin_step()
        if number < len(names) or rng.random() < 0.48:
            name = names[number] if number < len(names) else rng.choice(names)
            job = Job(f"r{number}", name, 4096, number / 8)
            hit[job.request_id] = rng.choice((0, 256, 1024, 3072))
            dlpm.add(job)
            lpm.add(job)
        elif running and rng.random() < 0.2:
            job = running.pop()
            preempted = rng.random() < 0.5
            dlpm.put_back(job, preempted=preempted)
            lpm.put_back(job, preempted=preempted)
        elif len(lpm):
            job = lpm.pop()
            assert dlpm.pop() == job
            dlpm.charge_extend(job.client, job.tokens - hit[job.request_id])
            running.append(job)


def test_what_peek_returned_is_popped_even_when_its_client_was_charged_meanwhile():
    order = make_order()
    order.add(Job("a", "ada", 100, 0.0))
    order.add(Job("b", "bob", 100, 1.0))
    chosen = order.peek()
    order.charge_extend(chosen.client, 10 * QUANTUM)
    assert order.pop() == chosen


def test_a_preempted_request_goes_before_its_client_s_others_and_not_before_other_clients():
    hit = {"cold": 0, "warm": 512, "hot": 1024, "other": 800}
    order = make_order(hit_tokens=hit.__getitem__, ageing_tokens_per_s=0.0)
    for name in ("cold", "warm", "hot"):
        order.add(Job(name, "ada", 2048, 0.0))
    order.remove("cold")
    order.put_back(Job("cold", "ada", 2048, 0.0), preempted=True)
    order.add(Job("other", "bob", 2048, 0.0))
    order.begin_step()
    assert [order.pop().request_id for _ in range(4)] == ["other", "cold", "hot", "warm"]


def test_a_cold_prompt_is_overtaken_only_by_hits_that_arrive_soon_after_it():
    hit_tokens, ageing, cold_at = 2000, 100.0, 5.0

    def serve(order, clock):
        """When the cold prompt is served, and how many arrived until hits may overtake it no more."""
        may_overtake = 0
        for step in range(1500):
            clock.now = step / 10
            for number in range(3):
                order.add(Job(f"{step}/{number}", "ada", 2048, clock.now))
            may_overtake += 3 if clock.now <= cold_at + hit_tokens / ageing else 0
            if clock.now == cold_at:
                order.add(Job("cold", "ada", 2048, clock.now))
            order.begin_step()
            if "cold" in (order.pop().request_id, order.pop().request_id):
                return clock.now, may_overtake
        return math.inf, may_overtake

    def hits(request_id):
        return 0 if request_id == "cold" else hit_tokens

    for kind in (DeficitOrder, PrefixOrder):
        clock = Clock()
        served, before = serve(kind(clock=clock, hit_tokens=hits, ageing_tokens_per_s=ageing), clock)
        assert served <= before / 20 + 0.1
        clock = Clock()
        served, _ = serve(kind(clock=clock, hit_tokens=hits, ageing_tokens_per_s=0.0), clock)
        assert served == math.inf


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantum_tokens": 0}, "quantum_tokens"),
        ({"quantum_tokens": math.nan}, "quantum_tokens"),
        ({"ageing_tokens_per_s": -1.0}, "ageing_tokens_per_s"),
        ({"ageing_tokens_per_s": math.inf}, "ageing_tokens_per_s"),
        ({"first_output_tokens": -1.0}, "first_output_tokens"),
        ({"extend_weight": -1.0}, "extend_weight"),
        ({"output_weight": math.nan}, "output_weight"),
        ({"refreshes_per_step": -1}, "refreshes_per_step"),
        ({"max_clients": -1}, "max_clients"),
        ({"idle_s": math.nan}, "idle_s"),
        ({"newcomers_per_refill": -1}, "newcomers_per_refill"),
    ],
)
def test_impossible_options_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        make_order(**options)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 1e-30])
def test_an_impossible_weight_is_refused_and_leaves_no_trace(weight):
    order = make_order()
    with pytest.raises(ValueError, match="weight"):
        order.add(Job("a", "ada", 100, 0.0, weight=weight))
    assert len(order) == 0
    assert "ada" not in clients(order)


def test_an_id_that_waits_is_refused_and_an_unknown_one_is_not_found():
    order = make_order()
    order.add(Job("a", "ada", 100, 0.0))
    for again in (order.add, lambda job: order.put_back(job, preempted=False)):
        with pytest.raises(ValueError, match="waits already"):
            again(Job("a", "bob", 100, 0.0))
    with pytest.raises(KeyError):
        order.remove("b")
    assert "bob" not in clients(order)
    order.check_integrity()


def served_while_all_wait(order, picks, change=lambda number: None, shares=MappingProxyType({})):
    """Tokens of each client while both always have requests waiting."""
    had = {"ada": 0, "bob": 0}
    for number in range(20):
        for name in had:
            order.add(Job(f"{name} {number}", name, 100, float(number)))
    for number in range(20, 20 + picks):
        change(number)
        order.begin_step()
        job = order.pop()
        order.charge_extend(job.client, 100)
        had[job.client] += 100
        share = shares.get(job.client, 1.0)
        order.add(Job(f"{job.client} {number}", job.client, 100, float(number), weight=share))
        order.check_integrity()
    return had


def test_a_quantum_that_changes_while_requests_wait_stays_fair():
    order = make_order(quantum_tokens=500)
    rng = random.Random(3)
    largest = 500

    def change(number):
        nonlocal largest
        if number % 40 == 0:
            largest = rng.choice([150, 500, 3000])
            order.set_quantum(largest)
            assert all(one.standing <= largest for one in order.clients())

    had = served_while_all_wait(order, 600, change)
    assert abs(had["ada"] - had["bob"]) <= 2 * 3000 + 2 * 100


def test_a_smaller_quantum_is_the_turn_that_a_client_gets():
    order = make_order(quantum_tokens=2000)
    order.set_quantum(200)
    turns = []
    for number in range(6):
        order.add(Job(f"a{number}", "ada", 100, 0.0))
        order.add(Job(f"b{number}", "bob", 100, 1.0))
    while len(order):
        job = order.pop()
        order.charge_extend(job.client, 100)
        turns.append(job.client)
    assert turns[:4] == ["ada", "ada", "bob", "bob"]


def test_a_client_whose_share_grows_while_it_waits_gets_more_from_then_on():
    order = make_order(quantum_tokens=500)
    shares: dict[str, float] = {}

    def change(number):
        if number == 20:
            order.reweigh("ada", 3.0)
            shares["ada"] = 3.0

    had = served_while_all_wait(order, 400, change, shares)
    assert had["ada"] == pytest.approx(3 * had["bob"], rel=0.1)


@pytest.mark.parametrize("tokens", [0, -1, math.inf, math.nan])
def test_a_quantum_is_above_zero(tokens):
    with pytest.raises(ValueError, match="quantum_tokens"):
        make_order().set_quantum(tokens)
