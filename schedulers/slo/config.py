"""The SLO policy's configuration: one frozen struct, the same keys in every engine."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from penstock.schedulers.slo.profiles import find_profile
from penstock.schedulers.slo.targets import Pace, Tiers

Lending = Literal["rest", "losses"]
Rule = Literal["sustained", "moore_hodgson", "edf_greedy", "dynamic_program"]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class SLOConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All knobs of the SLO policy. Times are in seconds.

    Raises:
        ValueError: tiers that do not ascend, or a profile that is neither shipped nor a file that holds one.
    """

    tiers_s: tuple[float, ...] = (0.025, 0.05, 0.1, 0.25)
    """Times per token at which requests are bucketed for admission; a request joins the next tighter one."""
    pace: Pace = "mean"
    """When token ``i`` is due: ``i`` times per token after the first one came (``mean``), after the first one
    was due (``cumulative``: an early first token banks slack), or one after the token before it (``gap``)."""
    lending: Lending | None = None
    """How long a step may be under ``mean``, beyond the pace of its decodes: as the ``rest`` of each answer
    makes up for, or as is worth the ``losses`` of answers that do not. None leaves it to the engine:
    ``losses`` in SGLang, where a step serves all decodes, ``rest`` in vLLM, where those with slack can be
    passed over."""
    lent_step_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.1
    """``rest``: so long at most; 0: never. The rest is taken to be as long as"""
    short_answer_quantile: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.1
    """this quantile of the output length, by class."""
    lost_answer_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.05
    """``losses``: a step may be as long as it takes so many seconds for each answer that is expected to miss
    its pace by it for good."""
    rule: Rule = "moore_hodgson"
    """Which requests are admitted when not all can be served in time. ``sustained`` admits all whose decodes
    the engine keeps at their pace, and so lets a new prompt make an admitted one late."""
    profile: str = "h100-13b"
    """Step-time profile to start from, a shipped one by name or a file that ``penstock profile`` wrote; the
    model corrects it online."""
    replan_s: Seconds = 0.1
    """Admission is decided anew after this time, or after so many arrivals or ends:"""
    replan_arrivals: Count = 10
    replan_finishes: Count = 6
    replan_at_once: Count = 32
    """While no more than so many wait with targets, every arrival is decided in the next step."""
    replan_window: Count = 200
    """Most waiting requests, earliest deadline first, that one decision weighs."""
    replan_work: Count = 500
    """Most states that one run of the dynamic program may make before EDF greedy decides instead."""
    long_prompt_weight: Share = 0.25
    """Exponent of a prompt's relative length in what admitting it is worth; 0 counts every request as one."""
    kept_bonus: Share = 0.5
    """How much more an admitted request is worth than an equal new one when not even the admitted fit."""
    longest_step_s: Seconds = 0.2
    """Most seconds of one step, however much slack is banked: a request that arrives meanwhile waits."""
    least_prefill_tokens: Count = 128
    """Prefill tokens of a step that a step-time model, however wrong, cannot take away."""
    resumed_token_s: Annotated[float, msgspec.Meta(ge=0, le=1)] = 5e-8
    """Seconds for each token of a decode that was passed over, when it is served again: vLLM's first model
    runner copies all of them and sends them to its workers. Decodes are passed over for prompts where that
    costs less than it saves. 0 where an adapter knows that it costs nothing."""
    late_tpots: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """A decode that is late by more than so many of its times per token keeps its pace but shortens no
    step.
    """
    most_skipped_steps: Count = 16
    most_skipped_s: Seconds = 1.0
    """A running request is passed over at most so many steps, and so long, in a row."""
    skipped_chunk_tokens: Count = 64
    """Prompt tokens that a request gets which was passed over for that long."""
    patience_s: Seconds = 10.0
    """Best-effort requests that waited this long share in every step:"""
    patient_share: Share = 0.1
    """The share of a step's prefill tokens that the longest waiting of them gets."""
    most_preemptions: Count = 3
    """A best-effort request is thrown out for admitted ones at most so often."""
    output_quantile: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.6
    """Quantile of the output length, by class, that admission reserves KV cache for."""

    def __post_init__(self) -> None:
        Tiers(self.tiers_s)
        find_profile(self.profile)
