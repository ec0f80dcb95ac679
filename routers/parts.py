"""Requests that ask for several answers, split into requests for one answer each.

A hand-off belongs to one prompt and is read once.

vLLM gives a completion with a list of prompts one set of
``kv_transfer_params``: on the prefill side only the first prompt's blocks are named in the answer (those of
the others wait for their lease to end), on the decode side every prompt pulls the blocks of the first
(``OpenAIServingCompletion.request_output_to_completion_response``; CVE-2026-94623 is what uneven prompts did
there). With ``n`` above 1 every child request pulls from blocks that are free after the first has read them
(``ParentRequest.get_child_info``). So the proxy makes one hand-off for each answer; sending such requests
whole to a decode server instead would put their prefills where they hurt most.

SGLang numbers the rooms of several prompts by itself (``GenerateReqInput._normalize_bootstrap_params``), but
sends all ``n`` answers to a prompt, and a request before them that fills the prefix cache, to the same room
(``TokenizerManager._handle_batch_request``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from penstock.routers.bodies import Body, choices_per_prompt
from penstock.routers.errors import ProxyError


@dataclass(frozen=True, slots=True)
class Part:
    """A request for one answer, which becomes choice ``index`` of the whole."""

    index: int
    prompt: int
    """Position of its prompt in the list of prompts."""
    choice: int
    """Position among the ``n`` answers to its prompt; 0 leads the others."""
    body: Body


def prompts_of(body: Body) -> list[Any] | None:
    """The prompts, where there are several; None for one, or for something that servers refuse."""
    prompts = body.get("prompt")
    if not isinstance(prompts, list) or len(prompts) < 2:
        return None
    several = all(isinstance(p, str) for p in prompts) or all(isinstance(p, list) for p in prompts)
    return prompts if several else None


def split(body: Body, limit: int, *, chat: bool, per_prompt: Collection[str] = ()) -> list[Part]:
    """One part for each answer, in the order of a server's choices; a single part is ``body`` itself.

    With a seed, the answers to one prompt use successive seeds, as vLLM's do. Lists under the keys
    ``per_prompt`` have one value a prompt.

    Raises:
        ProxyError: 400 for an ``n`` that is no integer from 1 to ``limit``, or more than ``limit`` answers.
    """
    n = choices_per_prompt(body, limit)
    prompts = None if chat else prompts_of(body)
    if n == 1 and prompts is None:
        return [Part(0, 0, 0, body)]
    count = n * len(prompts or [None])
    if count > limit:
        raise ProxyError(400, f"the request asks for {count} answers, at most {limit} are allowed")
    seed = body.get("seed")
    parts = []
    for index in range(count):
        prompt, choice = divmod(index, n)
        own = {key: value for key, value in body.items() if key != "n"}
        if prompts is not None:
            own["prompt"] = prompts[prompt]
            own |= {
                key: value[prompt]
                for key in per_prompt
                if isinstance(value := body.get(key), list) and len(value) == len(prompts)
            }
        if type(seed) is int and choice:
            own["seed"] = seed + choice
        parts.append(Part(index, prompt, choice, own))
    return parts
