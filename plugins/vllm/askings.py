"""What requests inside vLLM ask for, read from their sampling parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from penstock.schedulers.asking import Asking, forgiving
from penstock.schedulers.config import SchedulerConfig

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.penstock")

NO_EXTRA_ARGS: Mapping[str, Any] = {}


class Askings:
    """Reads who asks and how soon; a bad value becomes its default, with one warning for each field."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._warned: set[str] = set()

    def of(self, request: Request) -> Asking:
        """What a request asks for; the operator's weights and default targets are applied."""
        config = self._config
        found, errors = forgiving(extra_args_of(request), longest_client_id=config.longest_client_id)
        for error in errors:
            if error.field not in self._warned:
                self._warned.add(error.field)
                logger.warning("penstock: request %s: %s; its default is used", request.request_id, error)
        weight = config.weights.get(found.client)
        return found if weight is None else replace(found, weight=weight)


def extra_args_of(request: Request) -> Mapping[str, Any]:
    """What the client sent as ``vllm_xargs``, or gave ``SamplingParams`` as ``extra_args``."""
    given = getattr(request.sampling_params, "extra_args", None)
    return given if isinstance(given, Mapping) else NO_EXTRA_ARGS
