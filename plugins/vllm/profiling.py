"""Steps of chosen composition through a real engine in this process, for ``penstock profile``.

The engine is vLLM's own ``LLMEngine``; its scheduler is vLLM's with a watch (``step_watch``). Nothing of a
step is ordered here but who asks: decodes are requests that go on, a chunk of prefill is a prompt.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Self

# What vLLM says at its start is not what the command was asked for; a user's own choice stands.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# The engine core, with its scheduler, in this process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

from penstock.plugins.vllm.step_watch import WatchedStep, watched_scheduler
from penstock.schedulers.slo.profile_fit import MeasuredStep
from penstock.schedulers.slo.profile_plan import DECODE_STEPS, REPEATS, Batch, Room

STEPS_IN_FLIGHT = 4
"""More than an engine with overlap keeps under way."""


class ProfiledEngine:
    """An engine that runs batches of a plan. ``arguments`` are vLLM's for an engine, ``--model`` among them.

    With ``processor_time`` steps are measured by what this process computes: right for one thread on a CPU
    that others use as well.

    Raises:
        ValueError: they name a scheduler (the engine is measured under vLLM's own), or processor time is
            asked for where something else computes.
    """

    def __init__(self, arguments: Sequence[str], seed: int = 0, *, processor_time: bool = False) -> None:
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="penstock profile --"))
        config = EngineArgs.from_cli_args(parser.parse_args(list(arguments))).create_engine_config()
        if config.scheduler_config.scheduler_cls is not None:
            raise ValueError("a scheduler is given among the engine's arguments; leave it to vLLM's own")
        in_process = config.parallel_config.distributed_executor_backend == "uni"
        if processor_time and not (current_platform.is_cpu() and in_process):
            raise ValueError("--processor-time is for an engine of one process on the CPU")
        self._watched: list[WatchedStep] = []
        clock = time.process_time if processor_time else time.monotonic
        make = partial(watched_scheduler, watched=self._watched, clock=clock)
        config.scheduler_config.scheduler_cls = make
        self._engine = LLMEngine(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=False,
            multiprocess_mode=False,
        )
        self._config = config
        self._rng = random.Random(seed)
        self._names = map(str, itertools.count())
        self._live: set[str] = set()
        self._started: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.engine_core.shutdown()

    @property
    def room(self) -> Room:
        """What the engine takes at once."""
        scheduler, cache = self._config.scheduler_config, self._config.cache_config
        return Room(
            requests=scheduler.max_num_seqs,
            step_tokens=scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens,
            request_tokens=self._config.model_config.max_model_len,
            kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
        )

    @property
    def description(self) -> str:
        """Model, device and version, for whoever reads a profile."""
        model = Path(self._config.model_config.model)
        name = model.name if model.is_dir() else str(model)
        parallel = self._config.parallel_config.world_size
        ranks = f" x {parallel}" if parallel > 1 else ""
        overlap = "asynchronous" if self._config.scheduler_config.async_scheduling else "synchronous"
        device = current_platform.get_device_name() or current_platform.device_type
        return f"{name} on {device}{ranks}, vLLM {vllm.__version__}, {overlap} scheduling"

    def run(self, number: int, batch: Batch, until_s: float) -> list[MeasuredStep]:
        """Steps of one batch, until it is done or ``time.monotonic`` says ``until_s``."""
        try:
            for _ in self._acts(batch):
                self._step()
                if time.monotonic() >= until_s:
                    break
        finally:
            self._clear()
        steps = [MeasuredStep(one.features, one.seconds, number, batch.decodes) for one in self._watched]
        self._watched.clear()
        return steps

    def _acts(self, batch: Batch) -> Iterator[None]:
        """Ask for what ``batch`` holds; each turn wants one step."""
        decoding = {self._add(batch.context, batch.output_tokens) for _ in range(batch.decodes)}
        while not decoding <= self._started:
            yield
        yield from itertools.repeat(None, DECODE_STEPS if decoding else 0)
        for chunk in batch.chunks:
            for _ in range(REPEATS):
                name = self._add(chunk, 1)
                while name in self._live:
                    yield

    def _add(self, prompt_tokens: int, output_tokens: int) -> str:
        """A request whose prompt no prefix cache holds."""
        name = next(self._names)
        vocabulary = self._config.model_config.get_vocab_size()
        # Neither the special tokens that stand first nor the added ones at the end.
        ids = self._rng.choices(range(vocabulary // 8, vocabulary // 2), k=prompt_tokens)
        params = SamplingParams(
            max_tokens=output_tokens,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(name, {"type": "token", "prompt_token_ids": ids}, params)
        self._live.add(name)
        return name

    def _step(self) -> None:
        for output in self._engine.step():
            self._started.add(output.request_id)
            if output.finished:
                self._live.discard(output.request_id)

    def _clear(self) -> None:
        self._engine.abort_request(list(self._live))
        self._live.clear()
        self._started.clear()
        for _ in range(STEPS_IN_FLIGHT):
            self._engine.step()
