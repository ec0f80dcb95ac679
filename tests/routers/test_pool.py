"""Choice of a server and its health, as pure logic."""

from __future__ import annotations

from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from penstock.routers.pool import Pool, Server

URLS = tuple(f"http://s{i}" for i in range(5))


def healthy_pool(count: int) -> Pool:
    pool = Pool("decode", [Server("decode", url) for url in URLS[:count]])
    for server in pool.servers:
        server.mark_up()
    return pool


@given(
    count=st.integers(1, 5),
    steps=st.lists(
        st.tuples(st.sampled_from(["take", "drop", "down", "up"]), st.integers(0, 50)), max_size=80
    ),
)
def test_the_least_busy_healthy_server_is_picked(count: int, steps: list[tuple[str, int]]) -> None:
    pool = healthy_pool(count)
    held: list[tuple[ExitStack, str]] = []
    for action, at in steps:
        server = pool.servers[at % count]
        if action == "down":
            server.mark_down("scripted")
        elif action == "up":
            server.mark_up()
        elif action == "drop" and held:
            held.pop(at % len(held))[0].close()
        elif action == "take":
            picked = pool.pick()
            loads = [s.in_flight for s in pool.servers if s.healthy]
            assert (picked is None) == (not loads)
            if picked is not None:
                assert picked.healthy
                assert picked.in_flight == min(loads)
                stack = ExitStack()
                stack.enter_context(pool.occupy(picked))
                held.append((stack, picked.url))
        for s in pool.servers:
            assert s.in_flight == sum(url == s.url for _, url in held)


def test_a_busier_server_is_passed_over_even_when_it_is_its_turn() -> None:
    pool = healthy_pool(2)
    with ExitStack() as stack:
        first = pool.pick()
        assert first is not None
        stack.enter_context(pool.occupy(first))
        assert {server.url for _ in range(3) if (server := pool.pick())} == {URLS[1]}


def test_equally_busy_servers_take_turns() -> None:
    pool = healthy_pool(4)
    picks = [server.url for _ in range(8) if (server := pool.pick()) is not None]
    assert picks == [*URLS[:4], *URLS[:4]]


def test_an_excluded_server_is_never_picked() -> None:
    pool = healthy_pool(2)
    assert {server.url for _ in range(4) if (server := pool.pick([pool.servers[0]]))} == {URLS[1]}
    assert pool.pick(pool.servers) is None


def test_a_server_is_out_until_its_first_good_probe() -> None:
    pool = Pool("prefill", [Server("prefill", URLS[0])])
    assert pool.pick() is None
    pool.servers[0].mark_up()
    assert pool.pick() is pool.servers[0]


def test_two_late_probes_are_forgiven_and_a_third_in_a_row_is_not() -> None:
    server = healthy_pool(1).servers[0]
    for _ in range(3):
        server.probe_failed("late")
        server.probe_failed("late")
        assert server.healthy
        server.mark_up()
    for _ in range(3):
        server.probe_failed("late")
    assert not server.healthy


@given(st.integers(1, 2000))
def test_backoff_doubles_up_to_its_limit(failures: int) -> None:
    server = healthy_pool(1).servers[0]
    assert server.probe_delay_s(5.0, 0.25, 10.0) == 5.0
    for _ in range(failures):
        server.probe_failed("gone")
    assert server.probe_delay_s(5.0, 0.25, 10.0) == min(10.0, 0.25 * 2 ** min(failures - 1, 40))


def test_many_requests_that_meet_a_dead_server_count_as_one_failure() -> None:
    server = healthy_pool(1).servers[0]
    for _ in range(200):
        server.mark_down("refused")
    assert server.failures == 1
    assert server.probe_delay_s(5.0, 0.25, 10.0) == 0.25
