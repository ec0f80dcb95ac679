"""Keys, values and queries to select among: made up at three levels of peakiness, or of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

LEVELS = {"flat": 0.65, "mid": 1.35, "peaky": 2.5}
"""Factor of the queries."""
TOPICS = 96
RUN_TOKENS = 16
ROPE_BASE = 500_000.0


@dataclass(frozen=True, slots=True)
class Layer:
    """What one attention layer of one request sees while it decodes.

    ``queries`` [steps, H, G, D], multiplied by the softmax scale; ``keys`` and ``values`` [H, n, D], after
    RoPE. Step ``i`` of ``s`` sees the first ``n - s + i + 1`` tokens.
    """

    name: str
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def steps(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Query [H, G, D], keys and values of each step."""
        first = self.keys.shape[1] - len(self.queries) + 1
        for number, query in enumerate(self.queries):
            yield query, self.keys[:, : first + number], self.values[:, : first + number]

    def halves(self) -> tuple[Layer, Layer]:
        """The first half of the steps, and the second."""
        half = len(self.queries) // 2
        end = self.prompt + half
        first = Layer(self.name, self.queries[:half], self.keys[:, :end], self.values[:, :end])
        return first, Layer(self.name, self.queries[half:], self.keys, self.values)

    @property
    def prompt(self) -> int:
        """Tokens before the first step, which are indexed."""
        return self.keys.shape[1] - len(self.queries)


def made_up(
    level: str, seed: int, *, tokens: int, steps: int, heads: int = 4, group: int = 4, size: int = 128
) -> Layer:
    """Tokens in runs of one of 96 topics, as text has them; queries that ask for topics, some for two.

    Keys have a part that all share, strongest in a few channels, as keys of models do; the first four, with
    small values, are sinks that every query looks at. RoPE comes last. ``level`` is one of ``LEVELS``.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    topics, meanings = normal(heads, TOPICS, size), normal(heads, TOPICS, size)
    shared = normal(heads, 1, size) * (1 + 5 * (torch.rand(heads, 1, size, generator=random) < 0.03))
    topic = _runs(heads, tokens, random)[..., None].expand(-1, -1, size)
    keys = shared + 0.8 * topics.gather(1, topic) + 0.6 * normal(heads, tokens, size)
    values = 0.7 * meanings.gather(1, topic) + 0.7 * normal(heads, tokens, size)
    asked = torch.randint(TOPICS, (2, steps, heads, group), generator=random)
    asked[0] = asked[0, :, :, :1]
    head = torch.arange(heads)[:, None]
    second = 0.6 * torch.rand(steps, heads, group, 1, generator=random)
    wants = topics[head, asked[0]] + second * topics[head, asked[1]]
    sink = normal(heads, 1, size)
    keys[:, :4] = shared + 1.2 * sink
    values[:, :4] *= 0.1
    queries = (
        LEVELS[level] * (wants + 0.8 * normal(steps, heads, group, size)) + (0.7 + 0.5 * LEVELS[level]) * sink
    )
    places = torch.arange(tokens, dtype=torch.float32)
    queries = _rope(queries, places[tokens - steps :, None, None])
    return Layer(level, queries * size**-0.5, _rope(keys, places), values)


def _runs(heads: int, tokens: int, random: torch.Generator) -> torch.Tensor:
    """Topics [heads, tokens] that change with probability 1 / RUN_TOKENS a token."""
    change = torch.rand(heads, tokens, generator=random) < 1 / RUN_TOKENS
    drawn = torch.randint(TOPICS, (heads, tokens), generator=random)
    last = torch.where(change, torch.arange(tokens), 0).cummax(1).values
    return drawn.gather(1, last)


def _rope(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rotate channel ``i`` with channel ``i + D / 2`` by ``place * base ** (-2 i / D)``."""
    half = rows.shape[-1] // 2
    angles = places[..., None] * ROPE_BASE ** (-torch.arange(half) / half)
    first, second = rows[..., :half], rows[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def save_captured(file: Path, layers: Sequence[Layer]) -> None:
    """Write layers of a real model for ``load_captured``, float32."""
    arrays = {
        f"{layer.name}/{part}": getattr(layer, part).float().numpy()
        for layer in layers
        for part in ("queries", "keys", "values")
    }
    with file.open("wb") as out:
        np.savez(out, **arrays)


def load_captured(file: Path) -> list[Layer]:
    """The layers of a file that ``save_captured`` wrote.

    Raises:
        ValueError: it is no such file, or shapes do not fit each other.
    """
    with np.load(file) as found:
        names = dict.fromkeys(key.rpartition("/")[0] for key in found.files)
        layers = []
        for name in names:
            parts = [f"{name}/{part}" for part in ("queries", "keys", "values")]
            if any(part not in found.files for part in parts):
                raise ValueError(f"{file}: {name!r} has {sorted(found.files)}, needed: {', '.join(parts)}")
            layers.append(_checked(file, Layer(name, *(torch.from_numpy(found[part]) for part in parts))))
    return layers


def _checked(file: Path, layer: Layer) -> Layer:
    queries, keys = layer.queries, layer.keys
    fits = queries.ndim == 4 and keys.ndim == 3 and layer.values.shape == keys.shape
    if not fits or queries.shape[1::2] != keys.shape[::2] or len(queries) >= keys.shape[1]:
        shapes = [tuple(part.shape) for part in (queries, keys, layer.values)]
        raise ValueError(f"{file}: {layer.name!r} has {shapes}, needed: [steps, H, G, D] and twice [H, n, D]")
    return layer
