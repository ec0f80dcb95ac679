"""What a policy counts on SGLang: when it is shown, under which names, and changes while the server runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import REGISTRY

from penstock.patches import client_gauges as client_series
from penstock.patches.client_gauges import ClientGauges
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.sglang.publishing import Publisher
from penstock.plugins.sglang.runtime_changes import changed
from penstock.schedulers.client_service import REST
from penstock.schedulers.config import SchedulerConfig


class Shown:
    """Gauges, the clock and the source of a publisher, which note what happens."""

    def __init__(self, labels: dict[str, Any] | None, **ranks: Any) -> None:
        self.now = 100.0
        self.made: list[tuple[Any, ...]] = []
        self.seen: list[tuple[Any, ...]] = []
        logger = logging.getLogger("test")
        self.publisher = Publisher(self, self.make, labels, lambda: self.now, logger, **ranks)

    def make(self, *names: Any) -> Shown:
        self.made.append(names)
        return self

    def show(self, payload: dict[str, Any], *engine: str) -> None:
        self.seen.append((payload["value"], *engine))

    def payload(self) -> dict[str, Any]:
        return {"value": self.now}

    def line(self) -> str:
        return f"at {self.now:g}"


def test_it_is_shown_twice_once_a_second_and_when_the_engine_falls_idle():
    shown = Shown({"model_name": "m", "dp_rank": 3})
    assert shown.made == [("sglang:", ("model_name", "dp_rank")), ()]
    for _ in range(5):
        shown.now += 0.3
        shown.publisher.passed()
    assert [value for value, *_ in shown.seen] == pytest.approx([101.2, 101.2])
    assert [engine for _, *engine in shown.seen] == [["m", "3"], ["3"]]
    shown.publisher.idle()
    assert [value for value, *_ in shown.seen[2:]] == pytest.approx([101.5, 101.5])
    shown.publisher.idle()
    assert len(shown.seen) == 4


def test_without_metrics_the_log_has_a_line_now_and_then(caplog):
    caplog.set_level(logging.INFO, logger="test")
    shown = Shown(None)
    for _ in range(25):
        shown.now += 1.0
        shown.publisher.passed()
    assert shown.seen == shown.made == []
    assert [record.getMessage() for record in caplog.records] == ["penstock: at 110", "penstock: at 120"]


def test_ranks_that_show_nothing_settle_when_the_one_that_leads_does(caplog):
    caplog.set_level(logging.INFO, logger="test")
    settled: dict[str, list[float]] = {"first": [], "second": [], "third": []}
    leads = {"dp_rank": 0, "tp_rank": 0}
    ranks = {
        "first": Shown(leads, settle=lambda: settled["first"].append(ranks["first"].now)),
        "second": Shown(None, leads=False, settle=lambda: settled["second"].append(ranks["second"].now)),
        "third": Shown(leads, leads=False, settle=lambda: settled["third"].append(ranks["third"].now)),
    }
    for shown in ranks.values():
        for _ in range(31):
            shown.now += 0.4
            shown.publisher.passed()
        shown.publisher.idle()
    assert settled["first"] == settled["second"] == settled["third"]
    assert len(settled["first"]) == 11
    # Series that say nothing of ranks are the first one's, and so is the log.
    assert ranks["first"].made == [("sglang:", ("dp_rank", "tp_rank")), ()]
    assert ranks["third"].made == [("sglang:", ("dp_rank", "tp_rank"))]
    assert len(caplog.records) == 1


def test_names_that_come_and_go_are_bounded_where_series_cannot_be_removed(monkeypatch):
    monkeypatch.setattr(client_series, "MOST_NAMES", 3)
    gauges = ClientGauges("bounded:")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "anywhere")

    def show(**clients: int) -> dict[str, float | None]:
        rows = {client: [tokens, 0, 0.0, 0.0, 0] for client, tokens in clients.items()}
        gauges.show({"policy": "dlpm", "known": 9, "jain": 1.0, "clients": rows}, "0")
        labels = ({"engine": "0", "client": name} for name in ("a", "b", "c", "d", "e", REST))
        series = "bounded:penstock_client_extend_tokens"
        return {one["client"]: REGISTRY.get_sample_value(series, one) for one in labels}

    assert show(a=1, b=2, c=3) == {"a": 1, "b": 2, "c": 3, "d": None, "e": None, REST: None}
    found = show(b=2, d=4, e=5, **{REST: 10})
    assert found == {"a": 0, "b": 2, "c": 0, "d": None, "e": None, REST: 19}


CONFIG = SchedulerConfig(policy="dlpm", weights={"gold": 4.0})


def test_changes_join_what_the_server_was_started_with():
    found = changed(CONFIG, {"penstock.quantum_tokens": 50, "penstock.weights.plain": 2})
    assert found.quantum_tokens == 50
    assert found.weights == {"gold": 4.0, "plain": 2.0}
    assert changed(CONFIG, {}) == CONFIG


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"penstock.quantum_tokens": 0}, "quantum_tokens: given 0"),
        ({"penstock.quantum_tokens": float("nan")}, "quantum_tokens"),
        ({"penstock.weights.gold": 0}, "weights"),
        ({"penstock.weights." + "x" * 200: 1}, "longest_client_id"),
        ({"penstock.weights.": 1}, "cannot be changed, allowed: penstock.quantum_tokens"),
        ({"penstock.max_clients": 5}, "penstock.max_clients: cannot be changed"),
    ],
)
def test_what_cannot_be_changed_is_refused_by_name(values, reason):
    with pytest.raises(ConfigurationError, match=reason):
        changed(CONFIG, values)


def test_a_plan_takes_no_changes():
    with pytest.raises(ConfigurationError, match="slo knows no clients"):
        changed(SchedulerConfig(policy="slo"), {"penstock.quantum_tokens": 50})
