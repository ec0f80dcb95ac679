"""Requests and answers of the official ``openai`` client, with the token ids that the server sampled."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import openai

from penstock.benchmarks.tiny_model import corpus


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request, decoded greedily, so that two correct servers must answer alike."""

    name: str
    prompt: str | list[int]
    """Text, or token ids, which only a completion takes."""
    chat: bool = False
    stream: bool = False
    max_tokens: int = 32


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came back. ``first_token_s`` is measured at the client and only known for a streamed answer."""

    token_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    total_s: float
    first_token_s: float | None = None


class AskError(RuntimeError):
    """A server refused or broke off a request that it should have answered."""


def sample_asks(characters: Sequence[int] = (600, 1800, 6000, 18000), *, tag: str = "") -> list[Ask]:
    """One completion and one chat request, streamed and not, for each prompt length.

    No two prompts share a beginning, so that no answer comes out of a prefix cache; ``tag`` keeps two lists
    apart.
    """
    asks: list[Ask] = []
    kinds = itertools.product((False, True), (False, True))
    for (chat, stream), length in itertools.product(kinds, characters):
        name = f"{'chat' if chat else 'completion'}{' streamed' if stream else ''} {length:,} chars"
        prompt = _excerpt(f"{tag}{len(asks)}: ", start=411 * len(asks), length=length)
        asks.append(Ask(name=name, prompt=prompt, chat=chat, stream=stream))
    return asks


def churn_asks(count: int = 48, *, seed: int = 0) -> list[Ask]:
    """Short and long prompts in random order: they leave a block pool as fragmented as real traffic does."""
    rng = random.Random(seed)
    asks = []
    for index in range(count):
        prompt = _excerpt(
            f"churn {index}: ", start=rng.randrange(6000), length=rng.choice((400, 1500, 4000, 9000))
        )
        asks.append(Ask(name=f"churn {index}", prompt=prompt, max_tokens=rng.choice((2, 8, 32, 64))))
    return asks


def ask_together(
    url: str, model: str, asks: Sequence[Ask], *, at_once: int = 6, retries: int = 0
) -> list[Answer]:
    """As ``ask_all``, with ``at_once`` requests under way at any moment; answers in the order of ``asks``."""
    pool = ThreadPoolExecutor(at_once)
    try:
        return [
            answers[0] for answers in pool.map(lambda ask: ask_all(url, model, [ask], retries=retries), asks)
        ]
    finally:
        pool.shutdown(cancel_futures=True)


def ask_all(
    url: str, model: str, asks: Sequence[Ask], *, done: Callable[[int], None] | None = None, retries: int = 0
) -> list[Answer]:
    """Send the requests one after the other. ``done`` hears how many are answered. ``retries`` are for
    requests whose time does not count: a server that a busy machine keeps from answering is asked again.

    Raises:
        AskError: the server answered with an error, or not at all.
    """
    answers = []
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries, timeout=180) as client:
        for ask in asks:
            try:
                answers.append(_send(client, model, ask))
            except openai.OpenAIError as error:
                raise AskError(f"{url}: {ask.name}: {error}") from error
            if done is not None:
                done(len(answers))
    return answers


def _send(client: Any, model: str, ask: Ask) -> Answer:
    what: dict[str, object] = {"prompt": ask.prompt}
    create = client.completions.create
    if ask.chat:
        what = {"messages": [{"role": "user", "content": ask.prompt}]}
        create = client.chat.completions.create
    options = {"model": model, "max_tokens": ask.max_tokens, "temperature": 0.0, "stream": ask.stream}
    extra = {"return_token_ids": True}
    begin = time.perf_counter()
    if ask.stream:
        options["stream_options"] = {"include_usage": True}
        return _read_stream(create(**what, **options, extra_body=extra), begin)
    reply = create(**what, **options, extra_body=extra)
    choice = reply.choices[0]
    return Answer(
        token_ids=_token_ids(choice),
        text=choice.message.content if ask.chat else choice.text,
        prompt_tokens=reply.usage.prompt_tokens,
        total_s=time.perf_counter() - begin,
    )


def _read_stream(chunks: Iterator[Any], begin: float) -> Answer:
    first: float | None = None
    token_ids: list[int] = []
    text: list[str] = []
    prompt_tokens = 0
    for chunk in chunks:
        if chunk.usage is not None:
            prompt_tokens = chunk.usage.prompt_tokens
        for choice in chunk.choices:
            if ids := _token_ids(choice):
                first = first or time.perf_counter()
                token_ids += ids
            text.append((choice.delta.content if hasattr(choice, "delta") else choice.text) or "")
    end = time.perf_counter()
    return Answer(
        token_ids=tuple(token_ids),
        text="".join(text),
        prompt_tokens=prompt_tokens,
        total_s=end - begin,
        first_token_s=None if first is None else first - begin,
    )


def _token_ids(choice: Any) -> tuple[int, ...]:
    """vLLM's extension ``token_ids``, which the client keeps among the fields that it does not know."""
    return tuple((choice.model_extra or {}).get("token_ids") or ())


def _excerpt(head: str, *, start: int, length: int) -> str:
    text = corpus()
    body = itertools.islice(itertools.cycle(text), start % len(text), start % len(text) + length - len(head))
    return head + "".join(body)
