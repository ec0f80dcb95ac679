"""Answers of the needle in this process, one KV cache for all questions and all ways of attention.

The context is computed densely once. What differs between ways is attention in the steps that say the answer,
so that a difference in answers is theirs, and the questions are the same to the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from penstock.benchmarks.needle.model import NeedleModel, Rotary, capture
from penstock.benchmarks.needle.task import Prompt
from penstock.kernels.sparse.attention import attained, attend, logits
from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.paged_decode import PagedDecode
from penstock.kernels.sparse.paged_keys import Keys
from penstock.kernels.sparse.quest import Quest, QuestIndex
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.serving_stats import ServingStats

BLOCK_TOKENS = 32
"""As ``penstock.benchmarks.servers`` starts engines with; other sizes must divide it."""


class Attention(Protocol):
    """A way to attend in one step."""

    def begin(self, context: Context) -> None:
        """Another question follows: what was decoded after ``context.shared`` tokens is gone."""

    def __call__(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Output [H, G, D] of ``query`` [H, G, D], softmax scale included, on ``keys`` and ``values``
        [H, n, D]."""


class Context:
    """Keys and values of each layer, [H, size, D], of a prompt's first ``shared`` tokens and what follows."""

    def __init__(self, model: NeedleModel, tokens: Sequence[int], room: int) -> None:
        self._model = model
        self.shared = len(tokens)
        size = -(-(self.shared + room) // BLOCK_TOKENS) * BLOCK_TOKENS
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for found in capture(model, torch.tensor(tokens)):
            for caches, rows in ((self.keys, found.keys), (self.values, found.values)):
                cache = torch.zeros(len(rows), size, rows.shape[-1])
                cache[:, : self.shared] = rows
                caches.append(cache)

    def answer(self, prompt: Prompt, attention: Attention) -> list[int]:
        """Greedy answer to a prompt that begins with the context; its last token is the first that
        ``attention`` attends for."""
        at = self.shared
        *question, token = prompt.tokens[at:]
        with torch.inference_mode():
            for read in question:
                self._step(read, at, DENSE)
                at += 1
            attention.begin(self)
            output = []
            for _ in prompt.answer:
                token = self._step(token, at, attention)
                output.append(token)
                at += 1
        return output

    def _step(self, token: int, at: int, attention: Attention) -> int:
        model, shape = self._model, self._model.shape
        rotary = Rotary(torch.tensor([[at]]), shape)
        x = model.model.embed_tokens(torch.tensor([[token]]))
        for number, layer in enumerate(model.model.layers):
            query, key, value = layer.self_attn.project(layer.input_layernorm(x), rotary)
            keys, values = self.keys[number], self.values[number]
            keys[:, at], values[:, at] = key[0, :, 0], value[0, :, 0]
            grouped = query[0, :, 0].unflatten(0, (shape.kv_heads, -1)) * shape.head_size**-0.5
            mixed = attention(number, grouped, keys[:, : at + 1], values[:, : at + 1])
            x = x + layer.self_attn.o_proj(mixed.flatten())
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return int(model.logits(model.model.norm(x)).argmax())


class Dense:
    """All tokens."""

    def begin(self, context: Context) -> None:
        """Nothing is kept."""

    def __call__(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``Attention``."""
        return attend(query, keys, values).output


DENSE = Dense()


class Readings:
    """What a way read and attained, over all its steps."""

    def __init__(self) -> None:
        self.shares: dict[int, list[float]] = {}
        """Share of the tokens read, by layer: one for each KV head and step."""
        self.masses: list[float] = []
        """Exact attained mass of each query head and step, of KV heads that did not read everything."""

    def note(self, layer: int, query: Tensor, keys: Tensor, tokens: Tensor | None) -> None:
        """Tokens (bool [H, n]) were read, or all of them."""
        shares = self.shares.setdefault(layer, [])
        if tokens is None:
            shares += [1.0] * len(query)
            return
        shares += tokens.float().mean(1).tolist()
        some = ~tokens.all(1)
        self.masses += attained(logits(query, keys), tokens)[some].flatten().tolist()

    def add(self, other: Readings) -> None:
        """Take those of ``other`` in."""
        self.masses += other.masses
        for layer, shares in other.shares.items():
            self.shares.setdefault(layer, []).extend(shares)

    def share(self, layer: int | None = None) -> float:
        """Mean share read, of one layer or of all."""
        found = [share for at, some in self.shares.items() if layer in (None, at) for share in some]
        return sum(found) / len(found)


class TacticPages:
    """The pages that a server with ``--sparse-attention tactic`` and such blocks would read of a context."""

    def __init__(
        self, config: ServingConfig, calibration: Calibration, block_tokens: int = BLOCK_TOKENS
    ) -> None:
        self.readings = Readings()
        self._config, self._calibration, self._block_tokens = config, calibration, block_tokens
        self._stats = ServingStats()
        self._layers: list[PagedDecode] = []
        self._context: Context | None = None

    def begin(self, context: Context) -> None:
        """Forget the blocks that the question and the answer are written to."""
        if context is not self._context:
            self._context = context
            self._layers = [self._decode(layer, keys) for layer, keys in enumerate(context.keys)]
        for decode in self._layers:
            decode.index.forget(torch.arange(context.shared // self._block_tokens, decode.index.blocks))

    def _decode(self, layer: int, keys: Tensor) -> PagedDecode:
        heads, size, width = keys.shape
        index = BlockIndex(
            blocks=size // self._block_tokens,
            heads=heads,
            block_tokens=self._block_tokens,
            head_size=width,
            summary_tokens=self._config.summary_tokens,
            rounds=self._config.summary_rounds,
        )
        return PagedDecode(
            self._config, layer, index, _Paged(keys, self._block_tokens), self._calibration, self._stats
        )

    def __call__(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``Attention``."""
        count = keys.shape[1]
        blocks = torch.arange(-(-count // self._block_tokens))
        pages = self._layers[layer].pages(query, blocks, count, self._block_tokens)
        tokens = None if pages is None else pages.repeat_interleave(self._block_tokens, 1)[:, :count]
        self.readings.note(layer, query, keys, tokens)
        return attend(query, keys, values, tokens).output


class _Paged(Keys):
    """Keys of one layer whose block n is the n-th run of tokens."""

    def __init__(self, keys: Tensor, block_tokens: int) -> None:
        self._pages = keys.unflatten(1, (-1, block_tokens))

    def read(self, blocks: Tensor, heads: slice = slice(None)) -> Tensor:
        """``penstock.kernels.sparse.paged_keys.Keys.read``."""
        return self._pages[heads].index_select(1, blocks)


class QuestPages:
    """Quest with one budget for all layers, a share of the tokens, and pages of so many."""

    def __init__(self, config: SparseConfig, budget: float, page_tokens: int) -> None:
        self.readings = Readings()
        self._quest, self._budget = Quest(config, page_tokens), budget
        self._indexes: list[QuestIndex] = []
        self._context: Context | None = None

    def begin(self, context: Context) -> None:
        """Bounds are of the context; question and answer are always read."""
        if context is not self._context:
            self._context = context
            self._indexes = [
                self._quest.index(keys[:, : context.shared], values[:, : context.shared])
                for keys, values in zip(context.keys, context.values, strict=True)
            ]

    def __call__(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``Attention``."""
        tokens = self._quest.select(self._indexes[layer], query, keys, self._budget).tokens
        self.readings.note(layer, query, keys, tokens)
        return attend(query, keys, values, tokens).output
