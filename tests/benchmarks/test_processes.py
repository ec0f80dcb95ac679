"""Children are real processes here; they serve HTTP with the standard library alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.benchmarks.processes import (
    Port,
    Server,
    ServerError,
    termination_unwinds,
    wait_until_ready,
)

# Serves 200 on every path; with a second argument it also starts a grandchild that ignores SIGTERM.
SERVE = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
if len(sys.argv) > 2:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
    child = subprocess.Popen([sys.executable, "-c", stubborn + "; time.sleep(600)"], stdout=subprocess.PIPE)
    child.stdout.readline()
    print("grandchild", child.pid, flush=True)
server.serve_forever()
"""
DEADLINE_S = 30.0


def http_server(tmp_path: Path, *arguments: str, code: str = SERVE) -> Server:
    port = Port.reserve()
    command = [sys.executable, "-c", code, str(port.number), *arguments]
    return Server(name="child", command=command, port=port, log=tmp_path / "child.log", grace_s=5.0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # An orphan that nobody has waited for yet is dead all the same.
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(condition) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def state_of(process: int) -> str:
    """The letter that the kernel has for what a process does; T is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_server_serves_inside_the_block_and_is_gone_after_it(tmp_path):
    with http_server(tmp_path) as server:
        wait_until_ready([server], timeout_s=DEADLINE_S)
        assert server.running
    assert not server.running
    assert not alive(server.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_paused_server_stands_still_goes_on_and_can_be_stopped_meanwhile(tmp_path):
    with http_server(tmp_path) as server:
        wait_until_ready([server], timeout_s=DEADLINE_S)
        server.pause()
        wait_until(lambda: state_of(server.pid) == "T")
        server.resume()
        assert server.ready()
        server.pause()
        started = time.monotonic()
    assert not alive(server.pid)
    assert time.monotonic() - started < server.grace_s


def test_a_failing_block_stops_the_server_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), http_server(tmp_path) as server:
        raise KeyboardInterrupt
    assert not alive(server.pid)


def test_grandchildren_that_ignore_sigterm_end_as_well(tmp_path):
    with http_server(tmp_path, "with grandchild") as server:
        wait_until_ready([server], timeout_s=DEADLINE_S)
        wait_until(lambda: "grandchild" in server.log.read_text())
        grandchild = int(server.log.read_text().split()[1])
        assert alive(grandchild)
    wait_until(lambda: not alive(grandchild))


def test_a_child_that_ends_early_is_reported_at_once_with_its_error(tmp_path):
    code = "raise RuntimeError('the disk is full')"
    with http_server(tmp_path, code=code) as server, pytest.raises(ServerError) as caught:
        wait_until_ready([server], timeout_s=3600)
    assert "child ended with code 1" in str(caught.value)
    assert "RuntimeError: the disk is full" in str(caught.value)


def test_one_dead_server_fails_the_wait_for_all(tmp_path):
    healthy, dead = http_server(tmp_path / "a"), http_server(tmp_path / "b", code="raise SystemExit(3)")
    with healthy, dead, pytest.raises(ServerError, match="code 3"):
        wait_until_ready([healthy, dead], timeout_s=3600)


def test_a_server_that_never_answers_is_late(tmp_path):
    code = "import time; print('loading', flush=True); time.sleep(600)"
    with http_server(tmp_path, code=code) as server, pytest.raises(ServerError, match="within 0 s"):
        wait_until_ready([server], timeout_s=0.3)


def test_an_unknown_command_is_reported(tmp_path):
    server = Server(name="ghost", command=["no-such-command"], port=Port.reserve(), log=tmp_path / "log")
    with pytest.raises(ServerError, match="ghost: no-such-command: No such file"):
        server.start()
    server.stop()


def test_stop_is_harmless_before_the_start_and_twice(tmp_path):
    server = http_server(tmp_path)
    server.stop()
    other = http_server(tmp_path).start()
    other.stop()
    other.stop()
    assert not other.running


def test_a_held_port_goes_to_nobody_else_but_its_server_may_listen():
    held = Port.reserve()
    others = [Port.reserve() for _ in range(50)]
    assert held.number not in {port.number for port in others}
    with socket.socket() as rude, pytest.raises(OSError):
        rude.bind(("127.0.0.1", held.number))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", held.number))
        server.listen()
    for port in (held, *others):
        port.release()


PARENT = """
import sys
from pathlib import Path
from penstock.benchmarks.processes import Port, Server, wait_until_ready
port = Port.reserve()
command = [sys.executable, "-c", Path(sys.argv[1]).read_text(), str(port.number), *sys.argv[2:]]
server = Server(name="child", command=command, port=port, log=Path(sys.argv[1]).with_name("log")).start()
wait_until_ready([server], timeout_s=30)
print(server.pid, flush=True)
sys.stdin.read()
"""


def start_parent(tmp_path: Path, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    code = tmp_path / "serve.py"
    code.write_text(SERVE)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def test_killing_the_parent_ends_the_server_and_what_it_has_started(tmp_path):
    parent, child = start_parent(tmp_path, "with grandchild")
    wait_until(lambda: "grandchild" in (tmp_path / "log").read_text())
    grandchild = int((tmp_path / "log").read_text().split()[1])
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(child) and not alive(grandchild))


def test_a_parent_that_exits_without_a_word_stops_its_servers(tmp_path):
    parent, child = start_parent(tmp_path)
    parent.communicate("")
    assert parent.returncode == 0
    assert not alive(child)


FORKING_PARENT = PARENT.replace(
    "sys.stdin.read()",
    """
import os
if os.fork() == 0:
    sys.exit()
os.wait()
print("alive" if server.running and server.ready() else "gone", flush=True)
sys.stdin.read()
""",
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_that_exits_leaves_the_servers_alone(tmp_path):
    code = tmp_path / "serve.py"
    code.write_text(SERVE)
    command = [sys.executable, "-c", FORKING_PARENT, str(code)]
    output = subprocess.run(command, input="", capture_output=True, text=True, check=True).stdout
    assert output.split()[-1] == "alive"


@pytest.fixture
def hang_up_heeded():
    """SIGHUP ends a process, also where the test run itself was started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up_heeded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_unwinds_the_stack(number):
    before = signal.getsignal(number)
    unwound = False
    with pytest.raises(SystemExit) as caught, termination_unwinds():
        try:
            os.kill(os.getpid(), number)
            time.sleep(DEADLINE_S)
        finally:
            unwound = True
    assert unwound
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_an_interrupt_unwinds_even_where_a_shell_made_it_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), termination_unwinds():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(DEADLINE_S)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_hang_up_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination_unwinds():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
