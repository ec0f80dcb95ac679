"""SGLang's own scheduler, prefill adder, memory pools and prefix cache, stepped without running a model.

Real is ``Scheduler`` as a scheduler process of SGLang makes it, with a small model that is never run. Made up
are the worker's results and the token ids: token ``i`` of a piece is the piece's key, so that equal prompts
are equal lists of tokens. Settings are the process's own, so a process makes one engine.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers import scheduler as sglang_scheduler
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs

from penstock.simulation.records import Ask, Batch, Progress, Row
from penstock.simulation.unloaded_model import STOP, VOCABULARY, unloaded_model

CONTEXT_TOKENS = 131_072


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """The settings of the engine, as ``sglang serve`` has them, and the size of its KV cache in tokens.

    ``schedule`` and ``complete`` step SGLang's normal loop; ``overlap`` is for who runs its other loop.
    """

    kv_tokens: int
    chunked_prefill_size: int = 8192
    max_running_requests: int = 256
    schedule_policy: str = "fcfs"
    mixed_chunk: bool = False
    overlap: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def server_args(self, model: str) -> ServerArgs:
        """As SGLang's command line would fill them in, for the model in a folder."""
        return ServerArgs(
            model_path=model,
            load_format="dummy",
            dtype="float32",
            skip_tokenizer_init=True,
            max_total_tokens=self.kv_tokens,
            chunked_prefill_size=self.chunked_prefill_size,
            max_prefill_tokens=max(16_384, self.chunked_prefill_size),
            max_running_requests=self.max_running_requests,
            schedule_policy=self.schedule_policy,
            enable_mixed_chunk=self.mixed_chunk,
            disable_overlap_schedule=not self.overlap,
            random_seed=0,
            log_level="error",
            **({} if torch.cuda.is_available() else {"device": "cpu"}),
            **self.more,
        )


class SglangEngine:
    """``SteppedEngine`` over a real scheduler of SGLang.

    ``prepare(scheduler, clock)`` runs before the first request: the place to give a policy that reads time
    the virtual clock.
    """

    def __init__(
        self,
        shape: EngineShape,
        *,
        clock: Callable[[], float] = lambda: 0.0,
        prepare: Callable[[Any, Callable[[], float]], None] | None = None,
    ) -> None:
        load_plugins()
        with unloaded_model(CONTEXT_TOKENS, "float32") as folder:
            args = shape.server_args(folder)
            ports = PortArgs.init_new(args)
            publish(
                args,
                role="scheduler",
                ranks=sglang_scheduler.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0),
            )
            self.scheduler = sglang_scheduler.Scheduler(args, ports)
        self.scheduler.tp_worker.forward_batch_generation = self._sampled
        # There is nobody to send answers to; a rank of SGLang's that sends none has such a sender.
        self.scheduler.output_streamer.send_to_detokenizer = SenderWrapper(None)
        self._shape = shape
        self._asks: dict[str, Ask] = {}
        self._answers: dict[int, int] = {}
        self._waiting: set[str] = set()
        if prepare is not None:
            prepare(self.scheduler, clock)

    def add(self, ask: Ask) -> None:
        """Queue a request.

        Raises:
            ValueError: prompt and output are longer than the KV cache, or answers differ in more ways than
                there are tokens.
        """
        if ask.prompt_tokens + ask.allowed_tokens >= self._shape.kv_tokens:
            raise ValueError(
                f"request {ask.request_id!r} has {ask.prompt_tokens} + {ask.allowed_tokens} tokens, "
                f"allowed: fewer than {self._shape.kv_tokens}"
            )
        # SGLang ends a request at a token beyond its vocabulary, and has its prompts of any numbers.
        self._answers.setdefault(ask.answer, len(self._answers))
        if len(self._answers) > STOP:
            raise ValueError(f"{len(self._answers)} different answers, allowed: {STOP}")
        tokens = array("q")
        for piece in ask.prompt:
            tokens.extend([self._answers.get(piece.key, piece.key + VOCABULARY)] * piece.tokens)
        sampling = SamplingParams(
            max_new_tokens=ask.allowed_tokens,
            ignore_eos=ask.most_output_tokens is None,
            temperature=0.0,
            custom_params=custom_params(ask),
        )
        sampling.normalize(None)
        self._asks[ask.request_id] = ask
        self._waiting.add(ask.request_id)
        self.scheduler.handle_generate_request(
            TokenizedGenerateReqInput(
                rid=ask.request_id,
                input_text=None,
                input_ids=tokens,
                input_embeds=None,
                mm_inputs=None,
                token_type_ids=None,
                sampling_params=sampling,
                return_logprob=False,
                logprob_start_len=-1,
                top_logprobs_num=0,
                token_ids_logprob=None,
                stream=False,
                priority=ask.priority,
            )
        )
        queue = self.scheduler.waiting_queue
        if queue and queue[-1].rid == ask.request_id:
            # SGLang's front end stamps when it saw a request first, on its own clock. On prefill and decode
            # servers a request waits elsewhere first.
            queue[-1].time_stats.created_time = ask.arrival_s

    def schedule(self) -> Batch:
        """One turn of the scheduler's loop, up to the launch of its batch."""
        scheduler = self.scheduler
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        preempted = tuple(
            sorted(r.rid for r in scheduler.waiting_queue if r.is_retracted and r.rid not in self._waiting)
        )
        self._waiting.update(preempted)
        if batch is None:
            scheduler.last_batch = None
            return Batch([], preempted)
        decoding = set(batch.decoding_reqs or ()) if batch.forward_mode.is_extend() else set(batch.reqs)
        rows = [_row(request, decodes=request in decoding) for request in batch.reqs]
        self._waiting.difference_update(row.request_id for row in rows)
        return Batch(rows, preempted, (batch, scheduler.run_batch(batch)))

    def complete(self, batch: Batch) -> list[Progress]:
        """Give the scheduler what the step's requests sampled."""
        if batch.token is None:
            return []
        made, result = cast(tuple[Any, GenerationBatchResult], batch.token)
        before = {request.rid: len(request.output_ids) for request in made.reqs}
        self.scheduler.process_batch_result(made, result)
        self.scheduler.last_batch = made
        progress = []
        for request in made.reqs:
            new, finished = len(request.output_ids) - before[request.rid], request.finished()
            if new or finished:
                progress.append(Progress(request.rid, new, finished))
            if finished:
                self._asks.pop(request.rid, None)
        return progress

    def idle(self) -> None:
        """What SGLang does when nothing is left; its own check for leaks is part of it.

        Raises:
            ValueError: memory has leaked.
        """
        scheduler = self.scheduler
        scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.last_batch = None
        scheduler.on_idle()

    def _sampled(self, batch: Any, *_: Any, **__: Any) -> GenerationBatchResult:
        return GenerationBatchResult(
            logits_output=LogitsProcessorOutput(next_token_logits=None),
            next_token_ids=torch.tensor([self._next_token(one) for one in batch.reqs], dtype=torch.int64),
            can_run_cuda_graph=False,
        )

    def _next_token(self, request: Any) -> int:
        ask = self._asks[request.rid]
        ends = ask.most_output_tokens is not None and len(request.output_ids) + 1 >= ask.output_tokens
        return STOP if ends else self._answers[ask.answer]

    def describe(self) -> str:
        """What waits, what runs, and how much memory is free."""
        scheduler = self.scheduler
        free = scheduler.token_to_kv_pool_allocator.available_size()
        return (
            f"{len(scheduler.waiting_queue)} wait; {len(scheduler.running_batch.reqs)} run; "
            f"{free} of {self._shape.kv_tokens} tokens are free"
        )


def _row(request: Any, *, decodes: bool) -> Row:
    if decodes:
        return Row(request.rid, len(request.origin_input_ids) + len(request.output_ids) - 1, 1)
    return Row(request.rid, request.prefix_len, request.extend_end - request.prefix_len)


def custom_params(ask: Ask) -> dict[str, Any] | None:
    """What a client says about itself and its targets."""
    given = {
        "client_id": ask.client or None,
        "weight": ask.weight if ask.weight != 1.0 else None,
        "ttft_slo_ms": ask.ttft_slo_ms,
        "tpot_slo_ms": ask.tpot_slo_ms,
    }
    return {key: value for key, value in given.items() if value is not None} or None
