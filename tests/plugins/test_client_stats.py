"""Statistics of clients: from a scheduler, through vLLM's statistics, to the series of the front end."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

pytest.importorskip("vllm")

from arrival_order import ArrivalOrder
from stepped_scheduler import Settings, Stepper, build, request
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from penstock.patches.client_gauges import client_gauges
from penstock.patches.vllm import stat_logging
from penstock.plugins.vllm.request_scheduler import SyncRequestScheduler
from penstock.schedulers.client_service import NOBODY, REST, jain_index, snapshot
from penstock.schedulers.waiting import Job


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def served(**tokens: int) -> ArrivalOrder:
    order = ArrivalOrder()
    for client, count in tokens.items():
        order.charge_extend(client, count)
    return order


def test_the_index_is_one_for_equal_parts_and_one_nth_for_one_part():
    assert jain_index([5.0, 5.0, 5.0]) == pytest.approx(1)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([]) == jain_index([0.0, 0.0]) == 1


def test_clients_beyond_the_bound_are_summed_up():
    order = served(**{f"c{i:03}": i for i in range(200)})
    order.add(Job("r", "c000", 5, 0.0))
    found = snapshot(order, 3)
    assert [row.client for row in found.shown] == ["c199", "c198", "c197"]
    assert found.known == 200
    assert found.rest.extend_tokens == sum(range(197))
    assert found.rest.waiting == 1
    assert set(found.as_dict("dlpm")["clients"]) == {"c199", "c198", "c197", REST}


def test_those_that_name_no_client_have_a_name_of_their_own():
    order = served(a=1)
    order.charge_extend("", 5)
    assert [row.client for row in snapshot(order, 5).shown] == [NOBODY, "a"]


def test_a_client_cannot_take_the_name_of_the_rest():
    found = snapshot(served(**{REST: 100, "a": 1, "b": 2}), 1)
    assert [row.client for row in found.shown] == ["b"]
    assert found.as_dict("dlpm")["clients"][REST][0] == 101


class Front:
    """The loggers of a front end, each of which notes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.stat_loggers = [self]

    def record(self, stats: Any, *_: Any, **__: Any) -> None:
        self.seen.append(stats)


def crossed(stats: SchedulerStats) -> SchedulerStats:
    """As the front end receives it."""
    message = EngineCoreOutputs(scheduler_stats=stats)
    found = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(message))
    assert found.scheduler_stats is not None
    return found.scheduler_stats


@pytest.fixture
def patched():
    stat_logging.PATCH.install()
    yield
    stat_logging.PATCH.remove()


@pytest.fixture
def run():
    """A scheduler that exports, and the statistics that a run of it makes."""

    def run(*clients: str, export: bool = True, seconds: float = 0.5) -> tuple[Any, list[SchedulerStats]]:
        time = Time()
        scheduler = build(Settings(), SyncRequestScheduler, clock=time, front_end_exports=export)
        made: list[SchedulerStats] = []
        make = scheduler.make_stats
        scheduler.make_stats = lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1]
        for number, client in enumerate(clients):
            scheduler.add_request(request(f"r{number}", [number] * 20, client_id=client))
        stepper = Stepper(scheduler)
        while scheduler.has_unfinished_requests():
            stepper.step()
            time.now += seconds
        return scheduler, made

    return run


def value(series: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(series, labels)


def test_what_a_client_had_arrives_in_the_front_end_s_series(run, patched):
    _, made = run("a", "a", "b")
    front = Front()
    for stats in map(crossed, made):
        StatLoggerManager.record(front, stats, None, engine_idx=5)
    assert {stats.kv_connector_stats for stats in front.seen} == {None}
    label = {"engine": "5", "client": "a"}
    # The cached prefix of no prompt is another's: each is computed whole.
    assert value("penstock_client_extend_tokens", **label) == 40
    assert value("penstock_client_output_tokens", **label) == 8
    assert value("penstock_client_service_tokens", **label) == 40 + 2 * 8
    assert value("penstock_client_waiting_requests", **label) == 0
    assert value("penstock_client_jain_index", engine="5") == pytest.approx(0.9)
    assert value("penstock_clients_known", engine="5", policy="dlpm") == 2


def test_a_client_that_is_shown_no_more_leaves_no_series(patched):
    def show(*clients: str) -> None:
        rows = {client: [1, 1, 1.0, 1.0, 1] for client in clients}
        client_gauges().show({"policy": "dlpm", "known": 9, "jain": 1.0, "clients": rows}, "6")

    show("a", "b")
    show("b", "c")
    found = [value("penstock_client_extend_tokens", engine="6", client=c) for c in "abc"]
    assert found == [None, 1, 1]


def test_statistics_of_a_connector_stay_beside_ours():
    own = {"num_bytes": [1]}
    stats = SchedulerStats(kv_connector_stats={**own, stat_logging.PAYLOAD_KEY: {"jain": 1.0}})
    assert stat_logging.take_payload(stats) == {"jain": 1.0}
    assert stats.kv_connector_stats == own
    assert stat_logging.take_payload(stats) is None
    assert stat_logging.take_payload(None) is None


def test_nothing_travels_to_a_front_end_that_does_not_take_it(run):
    _, made = run("a", export=False)
    assert {stats.kv_connector_stats for stats in made} == {None}


def test_a_snapshot_travels_once_a_second_and_when_the_engine_falls_idle(run):
    _, made = run("a", seconds=0.3)
    carried = [stats.kv_connector_stats is not None for stats in made]
    assert carried[-1]
    assert sum(carried) < len(carried)


def test_the_interval_line_names_the_clients_with_the_most_service(run, caplog):
    caplog.set_level(logging.INFO, logger="vllm.penstock")
    run("a", "b", seconds=6.0)
    line = next(r.getMessage() for r in caplog.records if "Jain" in r.getMessage())
    assert "dlpm: 2 clients" in line
    assert "a: " in line
    assert "b: " in line


def test_a_manager_without_ours_is_called_as_before(patched):
    front = SimpleNamespace(stat_loggers=[Front()])
    StatLoggerManager.record(front, None, "iteration", "cache", 3)
    assert front.stat_loggers[0].seen == [None]
