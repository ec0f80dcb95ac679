"""Closed loops: clients that ask the next thing when they have been answered.

Lengths are those of the DLPM evaluation (arXiv 2501.14312): tree of thought on GSM8K of height 4, 546 tokens
in and 256 out in the mean; multi-turn chat, 56 a message and 142 an answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.simulation.arrivals import gamma_arrivals
from penstock.simulation.records import Ask, Piece, Served
from penstock.simulation.workloads import Keys


@dataclass(slots=True, kw_only=True)
class TreeOfThought:
    """A client that explores trees: every answered thought has ``branches`` children, down to ``height``.

    A prompt is the question followed by ``carried_tokens`` of each thought on the path. Four branches are 340
    requests a tree, with prompts of 546 tokens in the mean; two are 30.
    """

    name: str
    trees: int
    branches: int
    keys: Keys
    seed: int = 0
    height: int = 4
    question_tokens: int = 203
    thought_tokens: int = 256
    carried_tokens: int = 128
    rate: float | None = None
    _sent: int = 0

    def begin(self) -> Iterable[Ask]:
        """The first thoughts of every tree, all trees at once or at ``rate`` trees a second."""
        rng = random.Random(f"{self.seed} {self.name}")
        times = [0.0] * self.trees
        if self.rate is not None:
            times = gamma_arrivals(self.rate, self.trees, rng)
        for tree, time in enumerate(times):
            question = Piece(self.keys(), self.question_tokens)
            yield from self._children((question,), (tree,), time)

    def follow(self, served: Served) -> Iterable[Ask]:
        """The children of a thought, as soon as it is complete."""
        ask = served.ask
        if ask.client != self.name or len(ask.workflow) > self.height:
            return ()
        assert served.finished_s is not None
        path = (*ask.prompt, Piece(ask.answer, self.carried_tokens))
        return self._children(path, ask.workflow, served.finished_s)

    def _children(self, path: tuple[Piece, ...], place: tuple[int, ...], time: float) -> list[Ask]:
        return [self._thought(path, (*place, child), time) for child in range(self.branches)]

    def _thought(self, path: tuple[Piece, ...], place: tuple[int, ...], time: float) -> Ask:
        self._sent += 1
        return Ask(
            request_id=f"{self.name}-{'.'.join(map(str, place))}",
            arrival_s=time,
            prompt=path,
            output_tokens=self.thought_tokens,
            answer=self.keys(),
            client=self.name,
            priority=self._sent,
            workflow=place,
        )


@dataclass(slots=True, kw_only=True)
class Chat:
    """A client with ``conversations`` of ``turns`` each: a message, its answer, a pause, the next message.

    The pause is exponential with mean ``pause_s``. A prompt is the whole conversation so far.
    """

    name: str
    conversations: int
    turns: int
    keys: Keys
    seed: int = 0
    system_tokens: int = 0
    message_tokens: int = 56
    answer_tokens: int = 142
    pause_s: float = 0.0
    rate: float | None = None
    _rng: random.Random = field(init=False)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(f"{self.seed} {self.name}")

    def begin(self) -> Iterable[Ask]:
        """The first message of every conversation, all at once or at ``rate`` conversations a second."""
        times = [0.0] * self.conversations
        if self.rate is not None:
            times = gamma_arrivals(self.rate, self.conversations, self._rng)
        for number, time in enumerate(times):
            system = (Piece(self.keys(), self.system_tokens),) if self.system_tokens else ()
            yield self._message(system, (number, 0), time)

    def follow(self, served: Served) -> Iterable[Ask]:
        """The next message, after a pause."""
        ask = served.ask
        if ask.client != self.name or ask.workflow[1] + 1 >= self.turns:
            return ()
        assert served.finished_s is not None
        time = served.finished_s + (self._rng.expovariate(1 / self.pause_s) if self.pause_s else 0.0)
        number, turn = ask.workflow
        return [self._message((*ask.prompt, Piece(ask.answer, ask.output_tokens)), (number, turn + 1), time)]

    def _message(self, before: tuple[Piece, ...], place: tuple[int, int], time: float) -> Ask:
        self._sent += 1
        return Ask(
            request_id=f"{self.name}-{place[0]}.{place[1]}",
            arrival_s=time,
            prompt=(*before, Piece(self.keys(), self.message_tokens)),
            output_tokens=self.answer_tokens,
            answer=self.keys(),
            client=self.name,
            priority=self._sent,
            workflow=place,
        )


@dataclass(frozen=True, slots=True)
class Several:
    """Workloads side by side; each is told of every end and knows its own."""

    parts: tuple[TreeOfThought | Chat, ...]

    def begin(self) -> Iterable[Ask]:
        """What every part begins with."""
        return [ask for part in self.parts for ask in part.begin()]

    def follow(self, served: Served) -> Iterable[Ask]:
        """What the part does to which the request belongs."""
        return [ask for part in self.parts for ask in part.follow(served)]
