"""Real engines for the tests of this folder, each started once in a session and stopped at its end."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from penstock.benchmarks.processes import Server, running_servers, termination_unwinds
from penstock.benchmarks.servers import Engine, Pair, engine_server, serving, serving_pair
from penstock.benchmarks.tiny_model import ensure_model

HERE = Path(__file__).parent
LOG_MARKS = pytest.StashKey[dict[Path, int]]()
"""Length of each server's log when the test began."""
COMPLAINTS = 40
"""Lines of each server's warnings and errors that a failed test shows at most, the last ones."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    item.stash[LOG_MARKS] = {server.log: server.said() for server in running_servers()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what the servers complained of meanwhile: a status 500 alone tells nothing."""
    report = yield
    if report.failed:
        marks = item.stash.get(LOG_MARKS, {})
        for server in running_servers():
            if said := server.complaints(marks.get(server.log, 0)):
                report.sections.append((f"complaints of {server.name}", "\n".join(said[-COMPLAINTS:])))
    return report


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
