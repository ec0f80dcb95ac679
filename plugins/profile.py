"""``penstock profile``: what a step costs on this engine, as a prior for plans that look ahead."""

from __future__ import annotations

import importlib
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import msgspec
from rich.console import Console
from rich.table import Table

from penstock.schedulers.slo.profile_fit import (
    Errors,
    MeasuredStep,
    errors_by_kind,
    fit_profile,
    split,
    warmed_up,
)
from penstock.schedulers.slo.profile_plan import Batch, Room, batches
from penstock.schedulers.slo.profiles import Profile, write_profile

# By name: nothing imports an adapter, and an engine is imported only when it is measured.
ENGINE = "penstock.plugins.vllm.profiling"

Tell = Callable[[str], None]


class Engine(Protocol):
    """A real engine that runs batches; its adapter has it."""

    @property
    def room(self) -> Room:
        """What it takes at once."""

    @property
    def description(self) -> str:
        """Model, device and version."""

    def run(self, number: int, batch: Batch, until_s: float) -> list[MeasuredStep]:
        """Steps of one batch, until it is done or ``time.monotonic`` says ``until_s``."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """All steps of a measurement, and the batches that its time did not suffice for."""

    steps: list[MeasuredStep]
    missed: int


def measure(engine: Engine, seconds: float, tell: Tell, seed: int = 0) -> Measured:
    """Run the plan again and again, in ever new order, until ``seconds`` are over."""
    begin_s = time.monotonic()
    until_s = begin_s + seconds
    plan = list(enumerate(batches(engine.room, seed)))
    rng = random.Random(seed)
    steps: list[MeasuredStep] = []
    reached: set[int] = set()
    while True:
        for number, batch in plan:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return Measured(steps=steps, missed=len(plan) - len(reached))
            tell(
                f"{left_s:4.0f} s left, {len(steps):5} steps, {len(reached)} of {len(plan)} batches: {batch}"
            )
            steps += engine.run(number, batch, until_s)
            if time.monotonic() < until_s:
                reached.add(number)
        rng.shuffle(plan)


def table_of(errors: dict[str, Errors]) -> Table:
    """Errors on the steps that were held out."""
    table = Table("steps", "held out", "median step", "error P50", "error P90", title="Off by, relative")
    for kind, row in errors.items():
        table.add_row(
            kind, str(row.steps), f"{1e3 * row.seconds:.2f} ms", f"{row.median:.1%}", f"{row.p90:.1%}"
        )
    return table


def described(profile: Profile) -> str:
    """A profile's costs in one line."""
    knees = ", ".join(f"{1e6 * cost:.4g}" for cost in profile.knees_s)
    return (
        f"a step {1e3 * profile.base_s:.4g} ms, a token {1e6 * profile.token_s:.4g} us (above the knees "
        f"{knees} more), a request {1e6 * profile.request_s:.4g} us, "
        f"a thousand tokens of context {1e9 * profile.context_s:.4g} us"
    )


def usage(output: Path) -> str:
    """How a server takes the profile."""
    slo = {"policy": "slo", "slo": {"profile": str(output.resolve())}}
    return f"--additional-config '{json.dumps({'penstock': {'scheduler': slo}})}'"


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--model", required=True, help="A model's folder or name, as vllm serve takes it.")
@click.option(
    "--minutes",
    default=3.0,
    show_default=True,
    type=click.FloatRange(0.01, 1440),
    help="How long to measure, after the engine's start.",
)
@click.option(
    "--output",
    default="profile.json",
    show_default=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="File to write.",
)
@click.option("--seed", default=0, show_default=True, help="Order of the batches, and their prompts.")
@click.option(
    "--processor-time",
    is_flag=True,
    help="Count what this process computes, for one thread on a CPU that others use as well.",
)
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED)
def profile(
    model: str, minutes: float, output: Path, seed: int, processor_time: bool, engine_args: Sequence[str]
) -> None:
    """Measure what a step of an engine costs, and write it as a profile.

    The engine is started in this process with ENGINE_ARGS (after a --), those of vllm serve: give the ones
    that it will serve with. Batches of decodes over contexts of several lengths, alone and with prompts of
    several lengths, are measured until the time is over. The file is a prior for --request-scheduler slo.
    """
    if not output.resolve().parent.is_dir():
        raise click.BadParameter(f"{output.resolve().parent} is no folder", param_hint="--output")
    try:
        adapter: Any = importlib.import_module(ENGINE)
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"penstock profile needs the package {error.name}; pip install 'penstock[vllm]'"
        ) from None
    console, errors = Console(), Console(stderr=True)

    def tell(text: str) -> None:
        errors.print(text, highlight=False, soft_wrap=True)

    try:
        tell(f"starting an engine of {model}")
        arguments = ("--model", model, *engine_args)
        with adapter.ProfiledEngine(arguments, seed, processor_time=processor_time) as engine:
            tell(f"measuring {engine.description} for {minutes:g} minutes")
            measured = measure(engine, 60 * minutes, tell, seed)
            clock = ", processor time" if processor_time else ""
            source = f"{engine.description}; {len(measured.steps)} steps by penstock profile{clock}"
        fitted, held_out = split(warmed_up(measured.steps))
        found = fit_profile(fitted, source)
    except ValueError as error:
        raise click.ClickException(f"{error}") from error
    console.print(table_of(errors_by_kind(found, held_out)))
    console.print(described(found), highlight=False, soft_wrap=True)
    if measured.missed:
        tell(f"no time for {measured.missed} batches; more --minutes measure them")
    write_profile(output, found)
    console.print(f"{output} is written; use it with\n{usage(output)}", highlight=False, soft_wrap=True)
