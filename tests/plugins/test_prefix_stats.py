"""Statistics of shared prefixes: from a worker's counts to the series of the front end."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import REGISTRY

pytest.importorskip("vllm")

from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from penstock.kernels.shared_prefix.config import SharedPrefixConfig
from penstock.kernels.shared_prefix.planner import PrefixPlanner
from penstock.kernels.shared_prefix.stats import SharedPrefixStats
from penstock.patches.vllm import stat_logging
from penstock.plugins.vllm import prefix_stats

TABLES = np.array([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9, 10]], np.int32)


def planned(stats, config=None):
    shape = {"block_tokens": 16, "heads": 2, "group": 2}
    return PrefixPlanner(config or SharedPrefixConfig(), stats, **shape)


def test_steps_are_counted_by_what_they_read():
    stats = SharedPrefixStats()
    planner = planned(stats)
    for tokens in (50, 51):
        assert planner.plan(TABLES, np.array([tokens, 50, 60]), 1) is not None
    assert planner.plan(TABLES[1:], np.array([50, 60]), 1) is None
    assert planner.plan(TABLES[:1], np.array([50]), 1) is None
    found = stats.snapshot()
    assert (found.steps, found.stock_steps, found.runs, found.searches) == (2, 1, 2, 2)
    assert (found.blocks, found.blocks_read) == (24, 20)
    assert "saved 16.7 % of block reads in 2 steps, 1.0 runs each; 1 steps saved too little" in found.line()


@pytest.mark.parametrize(
    ("given", "taken"),
    [({"least_share": 0.16}, True), ({"least_share": 0.17}, False), ({"least_blocks": 3}, False)],
)
def test_a_step_that_saves_too_little_is_stocks(given, taken):
    planner = planned(SharedPrefixStats(), SharedPrefixConfig(**given))
    assert (planner.plan(TABLES, np.array([50, 50, 60]), 1) is not None) is taken


def test_what_a_worker_counted_arrives_in_the_front_end_s_series():
    stats = [SharedPrefixStats(), SharedPrefixStats()]
    before = (prefix_stats.collect() or {}).get("shared_prefix", {"blocks": 0})["blocks"]
    for each in stats:
        prefix_stats.count(each)
        planned(each).plan(TABLES, np.array([50, 50, 60]), 1)
    payload = prefix_stats.collect()
    assert payload is not None
    carried = SchedulerStats(kv_connector_stats={stat_logging.PAYLOAD_KEY: payload})
    stat_logging.PATCH.install()
    try:
        StatLoggerManager.record(SimpleNamespace(stat_loggers=[]), carried, None, engine_idx=3)
    finally:
        stat_logging.PATCH.remove()
    assert REGISTRY.get_sample_value("penstock_shared_prefix_blocks", {"engine": "3"}) == before + 24
