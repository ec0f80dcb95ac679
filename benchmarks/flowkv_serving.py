"""Hand-over between two real servers: from the prefill server's answer to the decode server's first token.

A pair of servers with FlowKV and a pair with vLLM's own NixlConnector stand side by side. Each prompt goes
through both, one after the other, the first alternating, so that whatever else the machine does falls on
both. Out of turn a pair's processes are stopped: idle NixlConnector workers keep two cores busy, which would
count against the other pair here and against nobody where each server has a machine of its own. The requests
go straight to the servers: no proxy is in what is measured.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from penstock.benchmarks.asks import AskError, ask_together, churn_asks
from penstock.benchmarks.flowkv_part import Finding, Options, Tell, percentile
from penstock.benchmarks.processes import ServerError
from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.scrape import Transfers, settled
from penstock.benchmarks.servers import Engine, Pair, serving_pair
from penstock.benchmarks.tiny_model import ensure_model
from penstock.routers.vllm_bodies import decode_body, prefill_body

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, STOCK = "flowkv", "NixlConnector"
LENGTHS = (64, 512, 2048, 6000)
SPECIAL_IDS = 6
WEARINGS = 3
NOISE_SHARE = 0.05
"""What two medians may differ by on a shared machine."""


class HandOverError(ServerError):
    """A server refused a request, or ended its answer without a token."""


class HandOver(msgspec.Struct, frozen=True):
    """One request through a pair."""

    hand_over_s: float
    """From the end of the prefill server's answer to the first token of the decode server."""
    first_token_s: float
    """From the request to the prefill server to the same token."""
    token_ids: tuple[int, ...]


Samples = dict[tuple[str, int], list[HandOver]]


def measure(options: Options, tell: Tell) -> Finding:
    """Both pairs, all lengths; block pools are worn by mixed traffic before anything is measured."""
    lengths, repeats = (LENGTHS[:2], 4) if options.quick else (LENGTHS, 15)
    model = str(ensure_model())
    logs = Path(tempfile.mkdtemp(prefix="penstock-serving-"))
    with contextlib.ExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for connector in (OURS, STOCK):
            tell(f"{connector}: starting two servers")
            waiting = _waiting(connector, tell)
            started = serving_pair(Engine(model=model), connector, logs, progress=waiting)
            pairs[connector] = stack.enter_context(started)
            wear(pairs[connector], connector, model, options.seed, tell)
            pairs[connector].pause()
        for pair in pairs.values():
            pair.resume()
        before = {name: settled(pair.decode.url, name) for name, pair in pairs.items()}
        samples = compare(pairs, model, prompts(lengths, repeats, options.seed, vocabulary(model)), tell)
        moved = {name: settled(pair.decode.url, name) - before[name] for name, pair in pairs.items()}
    shutil.rmtree(logs, ignore_errors=True)
    return Finding(
        rows=rows_of(samples, lengths, moved),
        claims=claims_of(samples, lengths),
        draw=lambda axes: draw(axes, samples, lengths),
    )


def wear(pair: Pair, connector: str, model: str, seed: int, tell: Tell) -> None:
    """Mixed traffic through the block pools. NixlConnector's first handshake may time out: asked again.

    Raises:
        AskError: a request failed in every one of ``WEARINGS`` attempts.
    """
    for attempt in range(1, WEARINGS + 1):
        tell(f"{connector}: wearing the block pools")
        try:
            ask_together(pair.url, model, churn_asks(seed=seed), retries=5)
        except AskError as error:
            tell(f"{connector}: {error}")
            if attempt == WEARINGS:
                raise
        else:
            return


def _waiting(connector: str, tell: Tell) -> Any:
    return lambda name, seconds: tell(f"{connector}: waiting for {name}, {seconds:.0f} s")


def vocabulary(model: str) -> int:
    """How many token ids the tokenizer knows; the server refuses others."""
    tokenizer = json.loads((Path(model) / "tokenizer.json").read_text(encoding="utf-8"))
    return len(tokenizer["model"]["vocab"])


def prompts(lengths: Sequence[int], repeats: int, seed: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, so that no prompt hits a prefix cache; ``repeats`` of each length, mixed."""
    rng = random.Random(seed)
    chosen = [length for length in lengths for _ in range(repeats)]
    rng.shuffle(chosen)
    # The first prompt of each length warms both pairs up and is thrown away.
    return [rng.choices(range(SPECIAL_IDS, vocabulary), k=n) for n in (*lengths, *chosen)]


def compare(pairs: dict[str, Pair], model: str, asked: Sequence[list[int]], tell: Tell) -> Samples:
    """Every prompt through every pair."""
    samples: Samples = defaultdict(list)
    warm = len({len(prompt) for prompt in asked})
    with contextlib.ExitStack() as stack:
        for pair in pairs.values():
            pair.pause()
            stack.callback(pair.resume)
        for number, prompt in enumerate(asked):
            tell(f"prompt {number + 1} of {len(asked)}, {len(prompt)} tokens")
            for name in sorted(pairs, reverse=bool(number % 2)):
                pair = pairs[name]
                pair.resume()
                took = hand_over(pair.prefill.url, pair.decode.url, model, prompt)
                pair.pause()
                if number >= warm:
                    samples[name, len(prompt)].append(took)
    return samples


def hand_over(prefill: str, decode: str, model: str, prompt: list[int], *, max_tokens: int = 8) -> HandOver:
    """One request, prefilled at one server and decoded at the other.

    Raises:
        HandOverError: a server refused it, or no token came.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    begin = time.perf_counter()
    with _posted(prefill, prefill_body(body, chat=False)) as answer:
        params = json.loads(answer.read())["kv_transfer_params"]
    prefilled = time.perf_counter()
    first, token_ids = None, []
    body |= {"stream": True, "return_token_ids": True}
    with _posted(decode, decode_body(body, params)) as answer:
        for ids in _streamed(answer):
            first = first or time.perf_counter()
            token_ids += ids
    if first is None:
        raise HandOverError(f"{decode} ended its answer without a token")
    return HandOver(first - prefilled, first - begin, tuple(token_ids))


@contextlib.contextmanager
def _posted(url: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    server = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    try:
        server.request(
            "POST", "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = server.getresponse()
        if answer.status != 200:
            raise HandOverError(f"{url} answered {answer.status}: {answer.read()[:500].decode()}")
        yield answer
    finally:
        server.close()


def _streamed(answer: http.client.HTTPResponse) -> Iterator[list[int]]:
    """Token ids of each event of a streamed completion."""
    for line in answer:
        data = line.removeprefix(b"data:").strip()
        if not data.startswith(b"{"):
            continue
        event = json.loads(data)
        if "error" in event:
            raise HandOverError(str(event["error"]))
        for choice in event["choices"]:
            if choice.get("token_ids"):
                yield choice["token_ids"]


def rows_of(samples: Samples, lengths: Sequence[int], moved: dict[str, Transfers]) -> list[dict[str, Cell]]:
    """One row a length and pair; what was moved stands for all lengths together."""
    rows: list[dict[str, Cell]] = []
    for length in lengths:
        for name in (OURS, STOCK):
            took = samples[name, length]
            over = [t.hand_over_s for t in took]
            first = [t.first_token_s for t in took]
            transfers = moved[name]
            rows.append(
                {
                    "prompt tokens": length,
                    "connector": name,
                    "requests": len(took),
                    "hand-over P50 ms": statistics.median(over) * 1e3,
                    "hand-over P90 ms": percentile(over, 0.9) * 1e3,
                    "TTFT P50 ms": statistics.median(first) * 1e3,
                    "TTFT P90 ms": percentile(first, 0.9) * 1e3,
                    "tokens equal": _equal(samples, length),
                    "descriptors each": transfers.each(transfers.descriptors),
                    "transfer ms each": _in_ms(transfers.each(transfers.transfer_s)),
                }
            )
    return rows


def _in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _equal(samples: Samples, length: int) -> int:
    pairs = zip(samples[OURS, length], samples[STOCK, length], strict=True)
    return sum(a.token_ids == b.token_ids for a, b in pairs)


def claims_of(samples: Samples, lengths: Sequence[int]) -> list[Claim]:
    """Ratios of the same prompts, in the median."""
    claims = []
    for length in lengths:
        pairs = list(zip(samples[OURS, length], samples[STOCK, length], strict=True))
        over = statistics.median(a.hand_over_s / b.hand_over_s for a, b in pairs)
        first = statistics.median(a.first_token_s / b.first_token_s for a, b in pairs)
        bound = 1 + NOISE_SHARE
        claims += [
            Claim.of(f"{length} tokens: hand-over, FlowKV to NixlConnector", over, "<=", bound),
            Claim.of(f"{length} tokens: TTFT, FlowKV to NixlConnector", first, "<=", bound),
            Claim.of(f"{length} tokens: answers equal", _equal(samples, length), "==", len(pairs)),
        ]
    return claims


def draw(axes: Axes, samples: Samples, lengths: Sequence[int]) -> None:
    """Hand-over against prompt length: a mark a request, a line through the medians."""
    for name in (OURS, STOCK):
        took = {length: [t.hand_over_s * 1e3 for t in samples[name, length]] for length in lengths}
        marks = axes.plot(
            [length for length in lengths for _ in took[length]],
            [ms for length in lengths for ms in took[length]],
            ".",
            alpha=0.4,
        )
        axes.plot(
            list(lengths),
            [statistics.median(took[length]) for length in lengths],
            color=marks[0].get_color(),
            label=name,
        )
    axes.set(xlabel="prompt tokens", ylabel="ms", xscale="log", yscale="log")
    axes.set_title("hand-over: prefill answered to first decoded token")
    axes.legend()
