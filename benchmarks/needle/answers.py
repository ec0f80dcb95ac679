"""How often dense attention answers the needle's prompts: by transformers in this process, or by a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from penstock.benchmarks.asks import Ask, ask_together
from penstock.benchmarks.needle.task import TASKS, Prompt, Task, make_prompts, most_questions, words

QUESTIONS = 8
"""Most questions that are asked of one context."""
Score = Callable[[Sequence[Prompt]], list[float]]
"""Scores of prompts that share a context."""


def accuracy(task: Task, length: int, contexts: int, seed: int, score: Score) -> float:
    """Mean score of a task: ``contexts`` contexts of ``length`` tokens with up to ``QUESTIONS`` each."""
    questions = min(QUESTIONS, most_questions(task, length))
    scores = []
    for number in range(contexts):
        scores += score(make_prompts(task, length, 1000 * seed + number, questions))
    return sum(scores) / len(scores)


class TransformersScore:
    """Scores by transformers' Llama in float32. The context's KV cache is kept for all of its questions."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaForCausalLM

        self._model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def __call__(self, prompts: Sequence[Prompt]) -> list[float]:
        """Greedy answers, each token in turn."""
        with torch.inference_mode():
            return self._scores(prompts)

    def _scores(self, prompts: Sequence[Prompt]) -> list[float]:
        shared = _shared_tokens(prompts)
        context = torch.tensor([prompts[0].tokens[:shared]])
        cache = self._model(context, use_cache=True, logits_to_keep=1).past_key_values
        scores = []
        for prompt in prompts:
            scores.append(prompt.score(self._answer(prompt, shared, cache)))
            cache.crop(shared - cache.get_seq_length())
        return scores

    def _answer(self, prompt: Prompt, shared: int, cache: Any) -> list[int]:
        output: list[int] = []
        tokens = list(prompt.tokens[shared:])
        for _ in prompt.answer:
            found = self._model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)
            tokens = [int(found.logits[0, -1].argmax())]
            output += tokens
        return output


class ServerScore:
    """Scores by a server with an OpenAI interface, such as ``vllm serve``, and its own tokenizer."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model, self._words = url, model, words()

    def __call__(self, prompts: Sequence[Prompt]) -> list[float]:
        """Greedy answers. The first request fills the prefix cache for those after it."""
        asks = [
            Ask(
                name=f"{prompt.task} {number}",
                # The tokenizer puts the first token, <s>, before every text.
                prompt=" ".join(self._words[token] for token in prompt.tokens[1:]),
                max_tokens=len(prompt.answer),
            )
            for number, prompt in enumerate(prompts)
        ]
        answers = ask_together(self._url, self._model, asks, at_once=1)
        return [prompt.score(answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]


def _shared_tokens(prompts: Sequence[Prompt]) -> int:
    """Length of the longest common beginning, at least one token short of the shortest prompt."""
    columns = zip(*(prompt.tokens[:-1] for prompt in prompts), strict=False)
    count = 0
    for column in columns:
        if len(set(column)) > 1:
            break
        count += 1
    return count


def accuracies(
    way: str,
    lengths: Sequence[int],
    contexts: int,
    seed: int,
    score: Score,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One row for each length: the accuracy of every task."""
    rows = []
    for length in lengths:
        row: dict[str, Any] = {"way": way, "tokens": length, "contexts": contexts}
        for task in TASKS:
            tell(f"{task} at {length:,} tokens")
            row[task] = accuracy(task, length, contexts, seed, score)
        rows.append(row)
    return rows
