"""``POST /set_internal_state`` for a policy: which keys it takes, and what may be said with them.

    {"server_args": {"penstock.quantum_tokens": 4000, "penstock.weights.gold": 4}}

SGLang takes numbers alone there, so a client's weight is a key of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from penstock.plugins.configuration import ConfigurationError, convert
from penstock.schedulers.config import SchedulerConfig

PREFIX = "penstock."
QUANTUM = PREFIX + "quantum_tokens"
WEIGHTS = PREFIX + "weights."


def weights_in(values: Mapping[str, float]) -> dict[str, float]:
    """The changes of weights, by client."""
    return {key.removeprefix(WEIGHTS): value for key, value in values.items() if key.startswith(WEIGHTS)}


def changed(config: SchedulerConfig, values: Mapping[str, float]) -> SchedulerConfig:
    """``config`` with changes; ``values`` by key.

    Raises:
        ConfigurationError: a key cannot be changed while the server runs, or not to its value.
    """
    if config.policy == "slo":
        raise ConfigurationError(f"{next(iter(values))}: policy slo knows no clients; it takes no changes")
    for key in values:
        if key != QUANTUM and not (key.startswith(WEIGHTS) and len(key) > len(WEIGHTS)):
            raise ConfigurationError(f"{key}: cannot be changed, allowed: {QUANTUM}, {WEIGHTS}CLIENT")
    raw = msgspec.to_builtins(config)
    # What is no float in JSON is one here: a quantum of 4000 is as good as one of 4000.0.
    raw["quantum_tokens"] = values.get(QUANTUM, config.quantum_tokens)
    raw["weights"] = {**config.weights, **weights_in(values)}
    return convert("scheduler", raw, SchedulerConfig)
