"""Requests that say something impossible of themselves are refused at the HTTP edge, where others are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from penstock.plugins.sglang.settings import inherited, scheduler_config
from penstock.schedulers.asking import AskingError, asking


@cache
def _longest_client_id() -> int:
    config = scheduler_config(inherited())
    assert config is not None
    return config.longest_client_id


def verify(original: Callable[..., Any], parameters: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``SamplingParams.verify``: what ``custom_params`` say of who asks is judged as well.

    Raises:
        AskingError: a value is not allowed. SGLang answers a ``ValueError`` from here with status 400.
    """
    result = original(parameters, *args, **kwargs)
    given = parameters.custom_params
    if isinstance(given, Mapping):
        asking(given, longest_client_id=_longest_client_id())
    elif given is not None:
        raise AskingError("custom_params", given, "an object")
    return result
