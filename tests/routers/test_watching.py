"""What an operator sees: /health and /metrics."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families
from scripted_engines import Site, eventually, hang, running_site, status


async def samples_of(site: Site) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of /metrics, read as Prometheus reads it."""
    async with site.http.get(f"{site.url}/metrics") as response:
        assert response.status == 200
        families = list(text_string_to_metric_families(await response.text()))
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


async def health_of(site: Site) -> tuple[int, dict]:
    async with site.http.get(f"{site.url}/health") as response:
        return response.status, await response.json()


async def test_health_is_ok_while_each_role_has_a_healthy_server() -> None:
    async with running_site(prefill=2) as site:
        code, answer = await health_of(site)
        assert (code, answer["status"]) == (200, "ok")
        assert [server["url"] for server in answer["prefill"]] == [s.url for s in site.prefill]
        site.servers("prefill")[0].mark_down("scripted")
        code, answer = await health_of(site)
        assert (code, answer["status"]) == (200, "ok")
        assert answer["prefill"][0] == {
            "url": site.prefill[0].url,
            "healthy": False,
            "in_flight": 0,
            "error": "scripted",
        }
        site.servers("decode")[0].mark_down("scripted")
        assert (await health_of(site))[0] == 503


async def test_requests_are_counted_by_route_mode_and_status(site: Site) -> None:
    site.decode[0].script = [status(400)]
    await site.complete()
    await site.complete()
    await site.complete(max_tokens=1)
    await site.http.post(
        f"{site.url}/v1/chat/completions", data=b"{", headers={"Content-Type": "application/json"}
    )
    await site.http.get(f"{site.url}/v1/models")
    samples = await samples_of(site)

    def count(route: str, mode: str, code: str) -> float:
        labels = frozenset({("route", route), ("mode", mode), ("status", code)})
        return samples["penstock_proxy_requests_total", labels]

    assert count("/v1/completions", "handoff", "400") == 1
    assert count("/v1/completions", "handoff", "200") == 1
    assert count("/v1/completions", "prefill_only", "200") == 1
    assert count("/v1/chat/completions", "", "400") == 1
    assert count("/v1/models", "", "200") == 1


async def test_durations_are_counted_once_a_step(site: Site) -> None:
    for stream in (True, False):
        response = await site.complete(stream=stream)
        await response.read()
    await eventually(lambda: site.metric("decode_seconds_count") == 2)
    samples = await samples_of(site)
    assert samples["penstock_proxy_prefill_seconds_count", frozenset()] == 2
    assert samples["penstock_proxy_ttft_seconds_count", frozenset()] == 1


async def test_requests_in_flight_are_shown_by_server(site: Site) -> None:
    site.decode[0].default = hang
    tasks = [asyncio.create_task(site.complete()) for _ in range(3)]
    await eventually(lambda: site.decode[0].active == 3)
    samples = await samples_of(site)
    decode = frozenset({("role", "decode"), ("server", site.decode[0].url)})
    prefill = frozenset({("role", "prefill"), ("server", site.prefill[0].url)})
    assert samples["penstock_proxy_in_flight", decode] == 3
    assert samples["penstock_proxy_in_flight", prefill] == 0
    assert samples["penstock_proxy_server_healthy", decode] == 1
    assert (await health_of(site))[1]["in_flight"] == 3
    site.decode[0].release.set()
    assert [(await task).status for task in tasks] == [200] * 3
    await eventually(lambda: site.idle)


async def test_two_proxies_in_one_process_count_apart() -> None:
    async with running_site() as one, running_site() as other:
        await one.complete()
        assert one.metric("prefill_seconds_count") == 1
        assert other.metric("prefill_seconds_count") == 0
