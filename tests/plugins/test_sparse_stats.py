"""Statistics of sparse attention: from a worker, through vLLM's outputs, to the series of the front end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from penstock.kernels.sparse.fallback import Reason
from penstock.kernels.sparse.serving import ServingConfig
from penstock.patches.vllm import stat_logging, worker_stats
from penstock.plugins.sparse_stats import summary
from penstock.plugins.vllm.sparse_stats import PART, Sources
from penstock.plugins.vllm.sparse_worker import SparseWorker


def worker(mass: float = 0.9) -> SparseWorker:
    """One that chose pages in layers 1 and 2, and was dense once."""
    made = SparseWorker(ServingConfig())
    made.tell_index(50, 1000)
    made.stats.chosen(1, 10, 40, 0.25)
    made.stats.chosen(2, 30, 40, 0.25)
    made.stats.dense(Reason.SHORT_CONTEXT)
    made.stats.indexed(7, 0.5)
    for _ in range(3):
        made.stats.measured(mass)
    return made


def value(series: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"penstock_sparse_{series}", labels)


class Engine:
    """Worker and scheduler with vLLM's methods replaced as the feature replaces them."""

    def __init__(self, collect: Any) -> None:
        self.now = 0.0
        self.unfinished = 1
        attach, pass_on = worker_stats.carrying(collect, lambda: self.now)
        self._sample = attach.replace(lambda _, grammar_output: grammar_output)
        self._update = pass_on.replace(self._stock_update)

    def get_num_unfinished_requests(self) -> int:
        return self.unfinished

    def _stock_update(self, _: Any, scheduler_output: Any, output: Any) -> dict[int, EngineCoreOutputs]:
        # The first client had nothing in this step.
        return {0: EngineCoreOutputs(), 1: EngineCoreOutputs(scheduler_stats=self.stats)}

    def step(self, output: ModelRunnerOutput, carried: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """A step's payload, as a front end in another process gets it."""
        self.stats = SchedulerStats(kv_connector_stats=carried)
        found = self._update(self, None, self._sample(self, output))[1]
        crossed = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(found))
        return stat_logging.take_payload(crossed.scheduler_stats)


def busy() -> ModelRunnerOutput:
    return ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0})


def test_what_a_worker_counted_arrives_in_the_front_end_s_series():
    made = worker(0.93)
    payload = Engine(lambda: {PART: summary([made])}).step(busy())
    stats = SchedulerStats(kv_connector_stats={stat_logging.PAYLOAD_KEY: payload})
    stat_logging.PATCH.install()
    try:
        StatLoggerManager.record(SimpleNamespace(stat_loggers=[]), stats, None, engine_idx=7)
    finally:
        stat_logging.PATCH.remove()
    assert value("attained_mass", engine="7", quantile="0.1") == 0.93
    assert value("pages_read", engine="7", layer="1") == 10
    assert value("pages", engine="7", layer="2") == 40
    assert value("dense_selections", engine="7", reason="short context") == 1
    assert value("selections", engine="7") == 2
    assert value("measurements", engine="7") == 3
    assert value("selection_seconds", engine="7") == 0.5
    assert value("index_blocks", engine="7") == 7
    assert value("index_seconds", engine="7") == 0.5
    assert value("index_bytes", engine="7") == 50
    assert value("cache_bytes", engine="7") == 1000


def test_statistics_travel_once_a_second_and_when_the_engine_falls_idle():
    engine = Engine(lambda: {"sparse": 1})
    carried = []
    for now in (0.0, 0.4, 0.8, 1.2, 1.6):
        engine.now = now
        carried.append(engine.step(busy()) is not None)
    assert carried == [True, False, False, True, False]
    engine.unfinished = 0
    assert engine.step(busy()) == {"sparse": 1}


def test_they_stay_beside_those_of_a_scheduler_and_of_a_connector():
    engine = Engine(lambda: {"sparse": 1})
    assert engine.step(busy(), {stat_logging.PAYLOAD_KEY: {"jain": 1.0}}) == {"jain": 1.0, "sparse": 1}
    engine.now = 5.0
    engine.step(busy(), {"num_bytes": [1]})
    assert engine.stats.kv_connector_stats == {"num_bytes": [1], stat_logging.PAYLOAD_KEY: {"sparse": 1}}


def test_an_output_that_all_steps_share_carries_nothing():
    assert Engine(lambda: {"sparse": 1}).step(EMPTY_MODEL_RUNNER_OUTPUT) is None
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, worker_stats.CARRIED)


def test_workers_are_added_up_and_masses_are_of_the_one_that_measures_most():
    one, other = worker(0.8), worker(0.95)
    other.stats.measured(0.95)
    found = summary([one, other])
    assert found["totals"]["selections"] == 4
    assert found["totals"]["cache_bytes"] == 2000
    assert found["dense"] == {"short context": 2}
    assert found["masses"] == {"0.1": 0.95, "0.5": 0.95}


def test_nobody_is_told_of_what_was_not_measured_or_where_nobody_hears():
    sources = Sources()
    assert sources.collect() is None
    fresh = SparseWorker(ServingConfig())
    sources.add(fresh)
    found = sources.collect()
    assert found is not None
    assert found["sparse"]["masses"] == {}
    sources.mute()
    assert sources.collect() is None
