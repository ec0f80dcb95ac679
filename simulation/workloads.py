"""Open workloads: requests that come whatever happens, with shared prefixes, from several clients.

Lengths are those of the DLPM evaluation (arXiv 2501.14312): long-document QA as in LooGLE, LLM-as-judge on
synthetic articles. Every content has a key of its own, so prompts share exactly what they are said to share.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from penstock.simulation.arrivals import gamma_arrivals, zipf_choices
from penstock.simulation.records import Ask, Piece, Served
from penstock.simulation.traces import CHUNK_TOKENS, TraceRequest


class Keys:
    """Hands out content keys, each once. A workload and its parts share one."""

    def __init__(self, first: int = 1) -> None:
        self._next = count(first)

    def __call__(self) -> int:
        return next(self._next)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A workload whose requests are all known beforehand."""

    asks: Sequence[Ask]

    def begin(self) -> Iterable[Ask]:
        """All of them."""
        return self.asks

    def follow(self, served: Served) -> Iterable[Ask]:
        """None."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixClient:
    """A client that asks ``questions`` about each of ``documents``, in shuffled order.

    A prompt is the document and then a question of its own. ``rate`` is requests a second, None for all at
    once; ``cv`` is that of the gaps.
    """

    name: str
    documents: int
    questions: int
    document_tokens: int
    question_tokens: int
    output_tokens: int
    rate: float | None = None
    cv: float = 1.0
    system: Piece | None = None
    """A prefix that this client's prompts share with others that have an equal one."""

    def asks(self, keys: Keys, rng: random.Random) -> list[Ask]:
        """The client's requests in order of arrival. ``priority`` is a request's number at its client."""
        documents = [Piece(keys(), self.document_tokens) for _ in range(self.documents)]
        order = [document for document in documents for _ in range(self.questions)]
        rng.shuffle(order)
        times: Sequence[float] = [0.0] * len(order)
        if self.rate is not None:
            times = gamma_arrivals(self.rate, len(order), rng, cv=self.cv)
        head = () if self.system is None else (self.system,)
        return [
            Ask(
                request_id=f"{self.name}-{number}",
                arrival_s=time,
                prompt=(*head, document, Piece(keys(), self.question_tokens)),
                output_tokens=self.output_tokens,
                answer=keys(),
                client=self.name,
                priority=number,
            )
            for number, (time, document) in enumerate(zip(times, order, strict=True))
        ]


def together(clients: Sequence[SharedPrefixClient], seed: int) -> Fixed:
    """All requests of several clients, in order of arrival; those that come at once are mixed.

    Each client's requests depend on the seed and its name alone, but for the keys of their contents.
    """
    keys = Keys()
    placed: list[tuple[float, float, Ask]] = []
    for one in clients:
        asks = one.asks(keys, random.Random(f"{seed} {one.name}"))
        rng = random.Random(f"{seed} {one.name} places")
        places = sorted(rng.random() for _ in asks)
        placed += [(ask.arrival_s, place, ask) for ask, place in zip(asks, places, strict=True)]
    return Fixed([ask for *_, ask in sorted(placed, key=lambda entry: entry[:2])])


def long_document_qa(
    name: str,
    *,
    documents: int,
    questions: int,
    scale: float = 1.0,
    more_tokens: int = 0,
    rate: float | None = None,
) -> SharedPrefixClient:
    """LooGLE: 21,449 shared tokens and 15 out, lengths of documents times ``scale``."""
    return SharedPrefixClient(
        name=name,
        documents=documents,
        questions=questions,
        document_tokens=round(21_449 * scale) + more_tokens,
        question_tokens=60,
        output_tokens=15,
        rate=rate,
    )


def judge(name: str, *, articles: int, dimensions: int, rate: float | None = None) -> SharedPrefixClient:
    """LLM-as-judge: 2,701 tokens in, of which all dimensions of an article share 2,581, and 256 out."""
    return SharedPrefixClient(
        name=name,
        documents=articles,
        questions=dimensions,
        document_tokens=2581,
        question_tokens=120,
        output_tokens=256,
        rate=rate,
    )


def flood(
    seconds: float, *, victims: int = 3, rate: float = 10.0, prefixes: int = 60, flood_rate: float = 60.0
) -> list[SharedPrefixClient]:
    """One client sends ``flood_rate`` requests a second on 2 hot prefixes, all others ``rate`` on their own.

    Each of the others has ``prefixes``. All go on for about ``seconds``, with prompts of 2,000 shared tokens
    and 100 of their own, and 64 tokens out.
    """
    client = partial(SharedPrefixClient, document_tokens=2000, question_tokens=100, output_tokens=64)
    few, many = max(round(rate * seconds / prefixes), 1), max(round(flood_rate * seconds / 2), 1)
    flooding = client(name="flood", documents=2, questions=many, rate=flood_rate)
    behaving = [
        client(name=f"victim-{n}", documents=prefixes, questions=few, rate=rate) for n in range(victims)
    ]
    return [flooding, *behaving]


def mooncake_prefixes(
    trace: Iterable[TraceRequest],
    seed: int,
    *,
    clients: int,
    requests: int,
    rate: float | None,
    exponent: float = 1.0,
    divisor: int = 4,
) -> Fixed:
    """The first ``requests`` of a Mooncake trace, dealt to ``clients`` by Zipf's law.

    Whoever has one request of a conversation has all of it; the first chunk, which nearly all requests share,
    makes no conversation. Lengths are divided by ``divisor``. Arrivals are Poisson, None: all at once.
    """
    rng = random.Random(f"{seed} mooncake")
    rows = [row for row, _ in zip(trace, range(requests), strict=False)]
    times = [0.0] * len(rows) if rate is None else gamma_arrivals(rate, len(rows), rng)
    drawn = zipf_choices(clients, len(rows), rng, exponent=exponent)
    owner: dict[int, int] = {}
    sent = [0] * clients
    asks = []
    for number, (row, time) in enumerate(zip(rows, times, strict=True)):
        known = next((owner[chunk] for chunk in reversed(row.chunks[1:]) if chunk in owner), None)
        client = next(drawn) if known is None else known
        owner.update(dict.fromkeys(row.chunks[1:], client))
        asks.append(
            Ask(
                request_id=f"m{number}",
                arrival_s=time,
                prompt=chunk_pieces(row, divisor),
                output_tokens=max(row.output_tokens // divisor, 1),
                answer=-number - 1,
                client=f"client-{client}",
                priority=sent[client],
            )
        )
        sent[client] += 1
    return Fixed(asks)


def chunk_pieces(row: TraceRequest, divisor: int = 1) -> tuple[Piece, ...]:
    """A trace's prompt as one piece a chunk, the last one as long as the prompt says."""
    size = CHUNK_TOKENS // divisor
    tokens = max(row.input_tokens // divisor, 1)
    pieces = []
    for chunk in row.chunks:
        if tokens <= 0:
            break
        pieces.append(Piece(chunk, min(size, tokens)))
        tokens -= size
    return tuple(pieces)
