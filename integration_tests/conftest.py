"""Real engines for the tests of this folder, each started once in a session and stopped at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.benchmarks.processes import Server, termination_unwinds
from penstock.benchmarks.servers import Engine, Pair, engine_server, serving, serving_pair
from penstock.benchmarks.tiny_model import ensure_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session", autouse=True)
def _servers_end_with_the_session() -> Iterator[None]:
    with termination_unwinds():
        yield


@pytest.fixture(scope="session")
def model() -> str:
    """The model of every engine here: ``PENSTOCK_MODEL``, or the tiny one."""
    return os.environ.get("PENSTOCK_MODEL") or str(ensure_model())


@pytest.fixture(scope="session")
def engine(model: str) -> Engine:
    """Template of the engines; ``msgspec.structs.replace`` makes variants."""
    return Engine(model=model)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the servers' logs."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def plain_server(engine: Engine, logs: Path) -> Iterator[Server]:
    """One stock server that does prefill and decode: the reference for tokens."""
    server = engine_server(engine, logs)
    with serving([server]):
        yield server


@pytest.fixture(scope="session")
def flowkv_pair(engine: Engine, logs: Path) -> Iterator[Pair]:
    """A prefill and a decode server with ``--kv-connector flowkv``, and the proxy. Leave them running."""
    with serving_pair(engine, "flowkv", logs) as pair:
        yield pair
