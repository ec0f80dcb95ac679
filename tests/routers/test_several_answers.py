"""Several prompts or n above 1: one hand-off for each answer, one answer for the client."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engines import (
    PATIENCE_S,
    Site,
    answer_with,
    completion,
    eventually,
    hang,
    hang_up,
    running_site,
    status,
    stream_then,
)

from penstock.routers.errors import ProxyError
from penstock.routers.merge import events_of
from penstock.routers.parts import split

LENGTHS = st.integers(0, 5)


def client_of(site: Site) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="secret", max_retries=0)


def text_of(prompt: str, seed: int | None, count: int) -> str:
    return "".join(f"{prompt}/{seed}/{i} " for i in range(count))


async def test_uneven_prompts_each_get_a_handoff_of_their_own(site: Site) -> None:
    prompts = ["a", "b" * 5000, "c d e"]
    answer = await client_of(site).completions.create(model="m", prompt=prompts, max_tokens=3)
    assert [(c.index, c.text) for c in answer.choices] == [
        (i, text_of(prompt, None, 3)) for i, prompt in enumerate(prompts)
    ]
    assert sorted(b["prompt"] for b in site.prefill[0].bodies) == sorted(prompts)
    named = {b["prompt"]: b["kv_transfer_params"]["remote_request_id"] for b in site.decode[0].bodies}
    asked = {b["prompt"]: h["X-Request-Id"] for _, b, h in site.prefill[0].requests}
    assert named == asked
    assert len(set(named.values())) == 3


async def test_prompts_of_token_ids_are_split_and_one_of_them_is_not(site: Site) -> None:
    await site.complete(prompt=[[1, 2], [3]])
    assert sorted(b["prompt"] for b in site.decode[0].bodies) == [[1, 2], [3]]
    await site.complete(prompt=[1, 2, 3])
    assert site.decode[0].bodies[-1]["prompt"] == [1, 2, 3]
    await site.complete(prompt=["only"])
    assert site.decode[0].bodies[-1]["prompt"] == ["only"]


async def test_choices_and_usage_are_numbered_and_summed_as_one_server_does(site: Site) -> None:
    response = await site.complete(prompt=["a", "b"], n=2, seed=10, max_tokens=3)
    answer = await response.json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, text_of("a", 10, 3)),
        (1, text_of("a", 11, 3)),
        (2, text_of("b", 10, 3)),
        (3, text_of("b", 11, 3)),
    ]
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22}
    assert answer["id"] == f"cmpl-{response.headers['X-Request-Id']}"
    assert all("n" not in body for body in site.decode[0].bodies)


async def test_streamed_chat_with_n_interleaves_numbered_choices(site: Site) -> None:
    stream = await client_of(site).chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "hi"}],
        n=3,
        max_completion_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = {0: "", 1: "", 2: ""}
    ids, usages = set(), []
    async for chunk in stream:
        ids.add(chunk.id)
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == dict.fromkeys(range(3), text_of("hi", None, 4))
    assert len(ids) == 1
    assert [(u.prompt_tokens, u.completion_tokens) for u in usages] == [(5, 12)]


async def test_streamed_prompts_end_once(site: Site) -> None:
    response = await site.complete(prompt=["a", "b", "c"], stream=True)
    raw = await response.read()
    assert raw.count(b"[DONE]") == 1
    assert raw.endswith(b"data: [DONE]\n\n")
    assert b'"usage"' not in raw


async def test_an_answer_starts_before_the_other_parts_are_ready(site: Site) -> None:
    site.decode[0].script = [stream_then(1, hang), hang]
    response = await site.complete(prompt=["a", "b"], stream=True)
    first = await asyncio.wait_for(response.content.readuntil(b"\n\n"), PATIENCE_S)
    assert b"/0 " in first
    site.decode[0].release.set()
    assert (await response.content.read()).endswith(b"[DONE]\n\n")


async def test_answers_to_one_prompt_prefill_after_the_first_and_at_its_server() -> None:
    async with running_site(prefill=3) as site:
        for server in site.prefill:
            server.default = hang
        task = asyncio.create_task(site.complete(n=4))
        await eventually(lambda: sum(len(s.requests) for s in site.prefill) == 1)
        for server in site.prefill:
            server.release.set()
        assert (await task).status == 200
        assert sorted(len(s.requests) for s in site.prefill) == [0, 0, 4]


async def test_at_most_split_concurrency_parts_are_under_way() -> None:
    async with running_site(split_concurrency=3) as site:
        site.decode[0].default = hang
        task = asyncio.create_task(site.complete(prompt=[str(i) for i in range(40)]))
        await eventually(lambda: site.decode[0].active == 3)
        assert len(site.prefill[0].requests) == 3, "the others wait"
        site.decode[0].release.set()
        assert len((await (await task).json())["choices"]) == 40
        assert site.decode[0].peak <= 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_part_refuses_the_whole_and_ends_the_others(site: Site, stream: bool) -> None:
    site.decode[0].default = hang
    site.prefill[0].script = [status(400, "prompt too long")]
    response = await site.complete(prompt=["a", "b", "c"], stream=stream)
    assert response.status == 400, await response.text()
    assert (await response.json())["error"]["message"] == "prompt too long"
    await eventually(lambda: site.idle)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_part_fails_the_whole_and_ends_the_others(site: Site, stream: bool) -> None:
    site.decode[0].script = [hang_up]
    site.decode[0].default = hang
    response = await site.complete(prompt=["a", "b", "c"], stream=stream)
    assert response.status == 502
    await eventually(lambda: site.idle)


async def test_a_part_that_breaks_off_later_is_told_in_the_stream(site: Site) -> None:
    site.decode[0].script = [stream_then(2, hang), stream_then(1, hang_up)]
    stream = await client_of(site).completions.create(model="m", prompt=["a", "b"], stream=True)
    with pytest.raises(openai.APIError, match="incomplete"):
        async for _ in stream:
            pass
    await eventually(lambda: site.idle)
    assert site.metric("broken_streams_total") == 1


@pytest.mark.parametrize("raw", [b"not json", b"[]", b'{"choices": 3}', b"\xff", b""])
async def test_garbage_of_a_decode_server_is_a_502(site: Site, raw: bytes) -> None:
    site.decode[0].default = answer_with(raw)
    assert (await site.complete(n=2)).status == 502


async def test_a_client_that_leaves_ends_every_part(site: Site) -> None:
    site.decode[0].default = hang
    task = asyncio.create_task(site.complete(prompt=["a", "b", "c"], n=2))
    await eventually(lambda: site.decode[0].active == 6)
    task.cancel()
    await eventually(lambda: site.idle)
    assert site.decode[0].aborted == 6
    assert site.metric("disconnects_total", stage="decode") == 1


@pytest.mark.parametrize(
    "fields", [{"n": 0}, {"n": -1}, {"n": "2"}, {"n": 2.0}, {"n": True}, {"n": 9}, {"prompt": ["x"] * 9}]
)
async def test_a_bad_number_of_answers_is_refused(fields: dict) -> None:
    async with running_site(max_choices=8) as site:
        response = await site.complete(**fields)
        assert response.status == 400
        assert "8" in (await response.json())["error"]["message"]
        assert site.prefill[0].requests == []


@given(prompts=st.lists(st.text(max_size=5), min_size=2, max_size=6), n=st.integers(1, 4))
def test_every_answer_is_asked_for_once_in_order(prompts: list[str], n: int) -> None:
    parts = split(completion(prompt=prompts, n=n, seed=1), 100, chat=False)
    assert [p.index for p in parts] == list(range(len(prompts) * n))
    assert [(p.body["prompt"], p.body["seed"]) for p in parts] == [
        (prompt, 1 + choice) for prompt in prompts for choice in range(n)
    ]
    with pytest.raises(ProxyError):
        split(completion(prompt=prompts, n=n), len(prompts) * n - 1, chat=False)


@given(
    payloads=st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3), max_size=6),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=30),
    newline=st.sampled_from([b"\n", b"\r\n"]),
)
def test_events_survive_any_cut_of_the_stream(payloads, cuts, newline) -> None:
    data = [json.dumps(payload).encode() for payload in payloads]
    raw = newline.join([b": comment", b""] + [b"data: " + d + newline for d in data] + [b""])

    async def chunks():
        at = 0
        for i in range(len(raw)):
            if at >= len(raw):
                return
            size = cuts[i % len(cuts)]
            yield raw[at : at + size]
            at += size

    async def collect() -> list[bytes]:
        return [event async for event in events_of(chunks())]

    assert asyncio.run(collect()) == data
