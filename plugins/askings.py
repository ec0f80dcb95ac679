"""What requests inside an engine ask for: bad values become defaults, and say so once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.schedulers.asking import Asking, forgiving
from penstock.schedulers.config import SchedulerConfig


class ForgivingReader:
    """Reads who asks and how soon; a bad value becomes its default, with one warning for each field."""

    def __init__(self, config: SchedulerConfig, logger: logging.Logger) -> None:
        self._config = config
        self._logger = logger
        self._warned: set[str] = set()

    def read(self, request_id: str, given: Mapping[str, Any]) -> Asking:
        """What a request asks for; the operator's weights are applied."""
        config = self._config
        found, errors = forgiving(given, longest_client_id=config.longest_client_id)
        for error in errors:
            if error.field not in self._warned:
                self._warned.add(error.field)
                self._logger.warning("penstock: request %s: %s; its default is used", request_id, error)
        weight = config.weights.get(found.client)
        return found if weight is None else replace(found, weight=weight)
