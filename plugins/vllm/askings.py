"""What requests inside vLLM ask for, read from their sampling parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penstock.plugins.askings import ForgivingReader
from penstock.schedulers.asking import Asking
from penstock.schedulers.config import SchedulerConfig

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.penstock")

NO_EXTRA_ARGS: Mapping[str, Any] = {}


class Askings:
    """Who asks and how soon, for each request."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._reader = ForgivingReader(config, logger)

    def of(self, request: Request) -> Asking:
        """What a request asks for; the operator's weights are applied."""
        return self._reader.read(request.request_id, extra_args_of(request))


def extra_args_of(request: Request) -> Mapping[str, Any]:
    """What the client sent as ``vllm_xargs``, or gave ``SamplingParams`` as ``extra_args``."""
    given = getattr(request.sampling_params, "extra_args", None)
    return given if isinstance(given, Mapping) else NO_EXTRA_ARGS
