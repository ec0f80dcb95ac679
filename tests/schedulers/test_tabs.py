"""Output that is charged late: every pick and every account as if it had been charged when the step began.

Weights and rates are dyadic, so that sums are exact in whatever order they are made.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from penstock.schedulers.asking import Asking
from penstock.schedulers.bills import Bill, Cashier
from penstock.schedulers.dlpm import DeficitOrder
from penstock.schedulers.tabs import Tabs
from penstock.schedulers.vtc import CounterOrder
from penstock.schedulers.waiting import Job

CLIENTS = ("", "ada", "bob", "cyd", "dee", "eve")
SETUPS = {
    "dlpm": lambda clock, hit: DeficitOrder(
        clock=clock, hit_tokens=hit, quantum_tokens=256, newcomers_per_refill=2
    ),
    "dlpm, charged as it comes": lambda clock, hit: DeficitOrder(
        clock=clock, hit_tokens=hit, quantum_tokens=4096, first_output_tokens=0
    ),
    "dlpm, few accounts": lambda clock, hit: DeficitOrder(
        clock=clock, hit_tokens=hit, quantum_tokens=512, max_clients=2, listed=("eve",)
    ),
    "vtc": lambda clock, hit: CounterOrder(clock=clock, quantum_tokens=512),
    "vtc, few accounts": lambda clock, hit: CounterOrder(clock=clock, max_clients=2, newcomers_per_refill=1),
    "vtc, soon forgotten": lambda clock, hit: CounterOrder(clock=clock, idle_s=4.0),
}


@dataclass(slots=True)
class Run(Bill):
    name: str = ""
    generated: int = 0


class World:
    """An order, charged ``late`` or at the beginning of each step, under one seed's traffic."""

    def __init__(self, setup: str, seed: int, *, late: bool) -> None:
        self.draw = random.Random(seed)
        self.now = 0.0
        self.hit: dict[str, int] = {}
        self.order = SETUPS[setup](lambda: self.now, self.hit.__getitem__)
        self.cashier = Cashier(self.order)
        self.tabs = Tabs(self.order, self.cashier, lambda run: run.generated) if late else None
        self.running: dict[str, Run] = {}
        self.retracted: list[Job] = []
        self.number = 0
        self.picks: list[str] = []

    def step(self) -> None:
        draw = self.draw
        self.now += draw.choice((0.125, 0.125, 0.5, 3.0))
        for run in self.running.values():
            run.generated += draw.choice((0, 1, 1, 1, 4))
        self.settle()
        for run in [run for run in self.running.values() if draw.random() < 0.1]:
            self.stop(run)
            self.cashier.close(run)
        for run in [run for run in self.running.values() if draw.random() < 0.02]:
            self.stop(run)
            self.cashier.release(run)
            self.order.put_back(self.job(run.name, run.asking.client), preempted=True)
        for _ in range(draw.choice((0, 0, 1, 2))):
            self.number += 1
            name = f"r{self.number}"
            self.hit[name] = draw.choice((0, 64, 256))
            self.order.add(self.job(name, draw.choice(CLIENTS)))
        if draw.random() < 0.02:
            self.order.set_quantum(draw.choice((128, 512, 2048)))
        if draw.random() < 0.02:
            self.order.reweigh(draw.choice(CLIENTS), draw.choice((0.5, 1.0, 4.0)))
        self.order.begin_step()
        for _ in range(min(len(self.order), draw.choice((0, 1, 1, 3)))):
            self.admit(self.order.pop())

    def job(self, name: str, client: str) -> Job:
        return Job(name, client, 256, self.now)

    def settle(self) -> None:
        if self.tabs is not None:
            self.tabs.begin_step()
        else:
            self.cashier.output((run, run.generated) for run in self.running.values())

    def admit(self, job: Job) -> None:
        self.picks.append(job.request_id)
        run = Run(Asking(client=job.client), self.now, name=job.request_id)
        self.running[job.request_id] = run
        if self.tabs is not None:
            self.tabs.open(job.request_id, run)
        self.cashier.reserve(run, 64)
        self.cashier.prompt(run, self.hit[job.request_id], 256, 256)

    def stop(self, run: Run) -> None:
        del self.running[run.name]
        if self.tabs is not None:
            self.tabs.close(run.name, run)


@pytest.mark.parametrize("setup", [name for name in SETUPS if "forgotten" not in name])
@pytest.mark.parametrize("seed", range(6))
def test_every_pick_and_account_is_as_if_all_were_charged_at_the_beginning_of_a_step(setup, seed):
    late, early = (World(setup, seed, late=late) for late in (True, False))
    for number in range(300):
        late.step()
        early.step()
        assert late.picks == early.picks
        if number % 50 == 49:
            late.order.check_integrity()
            assert {one.client: one for one in late.order.clients()} == {
                one.client: one for one in early.order.clients()
            }
    assert len(late.picks) > 100


def test_a_pick_settles_the_tabs_of_those_who_come_first_alone():
    world = World("vtc", 0, late=True)
    clients = ("ada", "bob", "cyd", "dee")
    for client in clients:
        world.hit[f"{client} runs"] = world.hit[client] = 0
        world.order.add(world.job(f"{client} runs", client))
        world.admit(world.order.pop())
    for number, client in enumerate(clients):
        world.order.add(world.job(client, client))
        world.order.charge_extend(client, 100 * number)
    # Seats everybody anew.
    world.order.set_quantum(512)
    for run in world.running.values():
        run.generated = 8
    world.settle()
    assert world.order.pop().client == "ada"
    assert [run.output_paid for run in world.running.values()] == [8, 0, 0, 0]
    assert {one.client: one.output_tokens for one in world.order.clients() if one.waiting} == {
        "bob": 8,
        "cyd": 8,
        "dee": 8,
    }


def test_a_client_is_not_forgotten_while_its_request_generates():
    world = World("vtc, soon forgotten", 0, late=True)
    for client in ("ada", "bob"):
        world.hit[client] = 0
        world.order.add(world.job(client, client))
        world.admit(world.order.pop())
    for _ in range(32):
        world.now += 1.0
        world.running["ada"].generated += 1
        world.settle()
        world.order.begin_step()
    assert {one.client: one.output_tokens for one in world.order.clients() if one.client} == {
        "(others)": 0,
        "ada": 32,
    }
