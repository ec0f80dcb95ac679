"""How often the needle's prompts are answered: by transformers in this process, or by a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from penstock.benchmarks.asks import Ask, ask_all
from penstock.benchmarks.needle.task import Prompt, Task, make_prompts, most_questions, shared_tokens, words

QUESTIONS = 8
"""Most questions that are asked of one context."""
Score = Callable[[Sequence[Prompt]], list[float]]
"""Scores of prompts that share a context."""


def contexts(task: Task, length: int, prompts: int, seed: int) -> Iterator[list[Prompt]]:
    """At least ``prompts`` prompts of ``length`` tokens, those that share a context together."""
    questions = min(QUESTIONS, most_questions(task, length))
    for number in range(-(-prompts // questions)):
        yield make_prompts(task, length, 1000 * seed + number, questions)


def scores(task: Task, length: int, prompts: int, seed: int, score: Score) -> list[float]:
    """The score of each of ``contexts``' prompts."""
    return [one for asked in contexts(task, length, prompts, seed) for one in score(asked)]


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
        shared = shared_tokens(prompts)
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

    def __init__(self, url: str, model: str, *, decoded: bool = False) -> None:
        """``decoded``: even the first token of an answer is to come out of a step that decodes.

        That takes a prefix cache and prompts of one token more than whole blocks have: all but that token
        are sent before, and cached.
        """
        self._url, self._model, self._decoded = url, model, decoded

    def __call__(self, prompts: Sequence[Prompt]) -> list[float]:
        """Greedy answers. The first request fills the prefix cache for those after it."""
        found = []
        for number, prompt in enumerate(prompts):
            name = f"{prompt.task} {number}"
            if self._decoded:
                self._ask(f"{name}, all but one token", prompt.tokens[:-1], 1)
            found.append(prompt.score(self._ask(name, prompt.tokens, len(prompt.answer))))
        return found

    def _ask(self, name: str, tokens: Sequence[int], most: int) -> Sequence[int]:
        ask = Ask(name=name, prompt=prompt_text(tokens), max_tokens=most)
        (answer,) = ask_all(self._url, self._model, [ask])
        return answer.token_ids


def prompt_text(tokens: Sequence[int]) -> str:
    """What the tokenizer turns into ``tokens``: it puts the first one, ``<s>``, before every text."""
    spoken = words()
    return " ".join(spoken[token] for token in tokens[1:])
