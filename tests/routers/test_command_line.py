"""Options of ``penstock proxy`` and what their mistakes get."""

from __future__ import annotations

import socket

import pytest
from click.testing import CliRunner

from penstock.routers.cli import proxy
from penstock.routers.config import ConfigError, ProxyConfig, split_urls

A, B, C = "http://10.0.0.1:8000", "http://10.0.0.2:8000", "https://host.example/prefix"


def test_urls_may_be_repeated_or_separated_by_commas() -> None:
    assert split_urls((f"{A},{B}/", f" {C} ")) == (A, B, C)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no prefill server"),
        (["--prefill", A], "no decode server"),
        (["--decode", A], "no prefill server"),
        (["--prefill", A, "--decode", A], "given twice"),
        (["--prefill", "10.0.0.1:8000", "--decode", B], "http://"),
        (["--prefill", "ftp://x", "--decode", B], "http://"),
        (["--prefill", "http://", "--decode", B], "no host"),
        (["--prefill", f"{A}/v1", "--decode", B], "without /v1"),
        (["--prefill", "http://u:p@x", "--decode", B], "without user"),
        (["--prefill", f"{A}?x=1", "--decode", B], "query"),
        (["--prefill", "http://x:99999", "--decode", B], "http://x:99999"),
        (["--prefill", "http://[::1", "--decode", B], "http://[::1"),
        (["--prefill", A, "--decode", B, "--port", "70000"], "0 to 65535"),
        (["--prefill", A, "--decode", B, "--idle-timeout", "0"], "idle_timeout_s is 0.0"),
        (["--prefill", A, "--decode", B, "--connect-timeout", "nan"], "connect_timeout_s is nan"),
        (["--prefill", A, "--decode", B, "--drain-timeout", "-1"], "drain_timeout_s is -1.0"),
        (["--prefill", A, "--decode", B, "--max-body-mib", "0"], "max_body_bytes is 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(options: list[str], said: str) -> None:
    result = CliRunner().invoke(proxy, options)
    assert result.exit_code == 2
    assert said in result.output.splitlines()[-1]


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(
            proxy, ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2", "--port", port]
        )
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith(f"Error: cannot listen on 127.0.0.1:{port}")


def test_it_listens_on_this_machine_alone_unless_told() -> None:
    assert ProxyConfig(prefill=(A,), decode=(B,)).host == "127.0.0.1"


def test_no_drain_time_is_allowed() -> None:
    assert ProxyConfig(prefill=(A,), decode=(B,), drain_timeout_s=0).drain_timeout_s == 0


def test_a_url_with_a_trailing_slash_is_refused_where_nobody_drops_it() -> None:
    with pytest.raises(ConfigError, match="trailing slash"):
        ProxyConfig(prefill=(f"{A}/",), decode=(B,))
