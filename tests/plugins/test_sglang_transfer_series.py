"""What FlowKV's transfers come to on SGLang: in which series, with which labels, and in the log."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from penstock.connectors.transfer_stats import TransferStatsData
from penstock.connectors.transports.base import TransferStats
from penstock.plugins.sglang import transfer_series
from penstock.plugins.sglang.transfer_series import TransferSeries, init_metrics_collector

LABELS = {"model_name": "m", "tp_rank": "1"}


@pytest.fixture
def seen() -> TransferStatsData:
    """Two transfers and a read that came too late."""
    data = TransferStatsData(stale_reads_refused=1)
    for descriptors in (1, 3):
        data.add_transfer(TransferStats(descriptors, 4096 * descriptors, 0.001, 0.25))
    return data


def value(name: str) -> float:
    return REGISTRY.get_sample_value(f"sglang:flowkv_{name}", LABELS) or 0.0


def test_observations_are_in_the_series_at_once_with_the_scheduler_s_labels(seen: TransferStatsData):
    names = ("num_descriptors_sum", "xfer_time_seconds_sum", "num_stale_reads_refused_total")
    before = [value(name) for name in names]
    series = TransferSeries(lambda: 0.0, logging.getLogger("test"), LABELS)
    series.show(seen)
    series.failed("handshake")
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [4, 0.5, 1]
    assert value("num_failed_handshakes_total") >= 1


def test_the_log_sums_up_ten_seconds_without_metrics_too(seen: TransferStatsData, caplog):
    caplog.set_level(logging.INFO, logger="test")
    now = [0.0]
    series = TransferSeries(lambda: now[0], logging.getLogger("test"), {})
    for now[0] in (3.0, 9.0, 10.0, 11.0):
        series.show(seen)
    series.show(TransferStatsData())
    (record,) = caplog.records
    assert "Num successful transfers 6" in record.getMessage()
    assert "Num stale reads refused 3" in record.getMessage()


def test_the_labels_are_those_of_the_scheduler_in_the_process(monkeypatch):
    monkeypatch.setattr(transfer_series, "_labels", {})
    scheduler = SimpleNamespace(metrics_collector=None)

    def original(it: SimpleNamespace) -> None:
        it.metrics_collector = SimpleNamespace(labels={"model_name": "m", "tp_rank": 1})

    init_metrics_collector(original, scheduler)
    assert transfer_series._labels == LABELS
    init_metrics_collector(lambda it: vars(it).update(metrics_collector=None), scheduler)
    assert transfer_series._labels == {}
