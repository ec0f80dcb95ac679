"""``--step-time`` of the benches that run on a virtual clock."""

from __future__ import annotations

import click

from penstock.simulation.step_time import StepTime, load_step_time


def loaded(context: click.Context, parameter: click.Parameter, value: str) -> StepTime:
    """A click callback: the step time that a shipped profile's name, or a JSON file, stands for.

    Raises:
        click.BadParameter: it is neither.
    """
    try:
        return load_step_time(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error
