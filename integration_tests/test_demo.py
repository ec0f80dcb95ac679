"""The demo as a user runs it: real servers, the installed command, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.benchmarks.servers import console_script

MARK = "PENSTOCK_TEST_MARK"
DEADLINE_S = 300.0


@pytest.fixture
def mark() -> Iterator[str]:
    """A value in the environment of everything that a demo starts; whatever a failed test leaves is ended."""
    value = uuid.uuid4().hex
    yield value
    for pid in marked(value):
        os.kill(pid, signal.SIGKILL)


def demo(mark: str, model: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [console_script("penstock"), "demo", "--model", model, *arguments],
        env={**os.environ, MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def marked(mark: str) -> list[int]:
    """Ids of the living processes that carry the mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if wanted in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


def wait_until(condition, running: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert running is None or running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_tokens_are_equal_few_descriptors_move_and_nothing_stays(mark, model, tmp_path):
    result = tmp_path / "demo.json"
    logs = str(tmp_path / "logs")
    run = demo(mark, model, "--connector", "flowkv", "--json", str(result), "--logs", logs)
    output, _ = run.communicate(timeout=1800)
    assert run.returncode == 0, output
    assert marked(mark) == []

    written = json.loads(result.read_text())
    assert [claim["holds"] for claim in written["claims"]] == [True] * len(written["claims"])
    plain, flowkv = written["rows"]
    assert flowkv["setup"] == "flowkv"
    assert flowkv["tokens equal"] == flowkv["requests"] == flowkv["transfers"] == plain["requests"] > 0
    assert 1 <= flowkv["descriptors each"] <= 4
    assert flowkv["KiB each"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_whatever_ends_the_demo_ends_its_servers(mark, model, tmp_path, number):
    run = demo(mark, model, "--connector", "flowkv", "--logs", str(tmp_path))
    log = tmp_path / "plain.log"
    wait_until(lambda: log.exists() and "EngineCore pid=" in log.read_text(), run)
    assert len(marked(mark)) > 2
    run.send_signal(number)
    run.communicate(timeout=DEADLINE_S)
    assert run.returncode in {130, 128 + number, -number}
    wait_until(lambda: marked(mark) == [])
