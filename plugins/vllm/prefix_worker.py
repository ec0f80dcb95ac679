"""What the layers of a vLLM worker share where prefixes are read once, and what they cannot do that with."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from penstock.kernels.decode_paths import device_here
from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.shared_prefix.attention import DTYPES, HEAD_SIZES, warm_up
from penstock.kernels.shared_prefix.config import SharedPrefixConfig
from penstock.kernels.shared_prefix.paths import choose_prefix_path
from penstock.kernels.shared_prefix.stats import SharedPrefixStats
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.vllm import prefix_stats
from penstock.plugins.vllm.packed_keys import lies_plain

logger = logging.getLogger("vllm.penstock")


class PrefixWorker:
    """Counts, and lines in the log; one object for each group of layers with the same blocks."""

    def __init__(self, config: SharedPrefixConfig) -> None:
        self._every = config.log_steps
        self._told = 0
        self.stats = SharedPrefixStats()
        prefix_stats.count(self.stats)

    def tell_layers(self, reasons: Mapping[str, str | None]) -> None:
        """Say which layers stay stock's whatever they hold."""
        stock = {name: reason for name, reason in reasons.items() if reason}
        if stock:
            listed = "; ".join(f"{name}: {reason}" for name, reason in stock.items())
            logger.warning(
                "penstock: shared prefixes: %d layers read them once for each request: %s", len(stock), listed
            )

    def warm_up(self, spec: Any, group: int) -> None:
        """Compile what steps will call, for layers of vLLM's ``AttentionSpec`` with ``group`` query heads a
        KV head, so that no request waits for a compiler."""
        began = time.perf_counter()
        warm_up(spec.dtype, spec.num_kv_heads, group, spec.head_size, spec.block_size)
        took = time.perf_counter() - began
        logger.info("penstock: shared prefixes: compiled kernels are ready after %.1f s", took)

    def tell_progress(self) -> None:
        """Write a line every ``log_steps`` steps that shared a prefix."""
        if self._every and self.stats.steps >= self._told + self._every:
            self._told = self.stats.steps
            logger.info("penstock: shared prefixes: %s", self.stats.snapshot().line())


def check(spec: Any, isa: str) -> None:
    """Refuse layers of vLLM's ``AttentionSpec`` whose cache the compiled kernels do not read.

    Raises:
        ConfigurationError: no Numba, a type, a head size, or a layout of the kernels ``isa`` that they lack.
    """
    choice = choose_prefix_path(device_here(), numba=HAS_NUMBA)
    if choice.path is None:
        raise ConfigurationError(f"shared prefixes: {choice.reason}")
    if spec.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ConfigurationError(f"shared prefixes: given a KV cache of {spec.dtype}, allowed: {allowed}")
    if spec.head_size % HEAD_SIZES:
        raise ConfigurationError(
            f"shared prefixes: given heads of {spec.head_size}, allowed: multiples of {HEAD_SIZES}"
        )
    if not lies_plain(isa, spec.dtype, spec.block_size, spec.head_size):
        raise ConfigurationError(
            f"shared prefixes: given a KV cache as the kernels {isa!r} of this CPU keep it, allowed: keys by "
            "channel and values by token, as 'vec' and 'vec16' do"
        )
