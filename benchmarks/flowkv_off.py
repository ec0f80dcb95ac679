"""Installed and off costs nothing: one plain server that loads Penstock's plugins, one that must not.

Both answer the same requests in turn, the first alternating; a round's ratio of throughputs is one sample.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.benchmarks.asks import Ask, ask_together, churn_asks
from penstock.benchmarks.flowkv_part import Finding, Options, Tell
from penstock.benchmarks.processes import Server
from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.servers import Engine, engine_server, serving
from penstock.benchmarks.tiny_model import ensure_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INSTALLED, WITHOUT = "installed and off", "not loaded"
NO_PLUGIN = {"VLLM_PLUGINS": "none"}
"""vLLM loads only the plugins that are named here; none is called so."""
AT_ONCE = 4


class Rounds(msgspec.Struct, frozen=True):
    """Generated tokens a second, round by round, in the same order for both servers."""

    installed: list[float]
    without: list[float]

    @property
    def ratios(self) -> list[float]:
        """Throughput with the plugin over throughput without, a round each."""
        return [a / b for a, b in zip(self.installed, self.without, strict=True)]

    @property
    def noise(self) -> float:
        """Two standard errors of the median ratio, from the median absolute deviation; at least 1 %."""
        middle = statistics.median(self.ratios)
        spread = 1.4826 * statistics.median(abs(ratio - middle) for ratio in self.ratios)
        return max(0.01, 2 * 1.2533 * spread / len(self.ratios) ** 0.5)


def measure(options: Options, tell: Tell) -> Finding:
    """Both servers side by side."""
    rounds, requests = (4, 12) if options.quick else (16, 24)
    model = str(ensure_model())
    logs = Path(tempfile.mkdtemp(prefix="penstock-off-"))
    servers = {name: plain_server(model, name, logs) for name in (INSTALLED, WITHOUT)}

    def waiting(name: str, seconds: float) -> None:
        tell(f"waiting for {name}, {seconds:.0f} s")

    with serving(list(servers.values()), progress=waiting):
        found = compare(servers, model, churn_asks(requests, seed=options.seed), rounds, tell)
    shutil.rmtree(logs, ignore_errors=True)
    middle = statistics.median(found.ratios)
    name = "throughput with the plugin to without, within noise"
    return Finding(
        rows=rows_of(found),
        claims=[Claim.of(name, middle, ">=", 1 - found.noise)],
        draw=lambda axes: draw(axes, found),
    )


def plain_server(model: str, name: str, logs: Path) -> Server:
    """One server without a connector.

    Both are started by module: the ``vllm`` command of the CPU build needs our platform plugin to find its
    own version.
    """
    label = name.replace(" ", "-")
    server = engine_server(Engine(model=model, name=label), logs)
    _, _, served, *arguments = server.command
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", served, *arguments]
    environment: dict[str, Any] = {**server.environment, **(NO_PLUGIN if name == WITHOUT else {})}
    return dataclasses.replace(server, command=command, environment=environment)


def compare(servers: dict[str, Server], model: str, asks: Sequence[Ask], rounds: int, tell: Tell) -> Rounds:
    """``rounds`` rounds after one that warms up."""
    found = Rounds([], [])
    for number in range(-1, rounds):
        tell(f"round {number + 1} of {rounds}")
        for name in sorted(servers, reverse=bool(number % 2)):
            tagged = [msgspec.structs.replace(ask, prompt=f"{number} {ask.prompt}") for ask in asks]
            begin = time.perf_counter()
            answers = ask_together(servers[name].url, model, tagged, at_once=AT_ONCE)
            rate = sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - begin)
            if number >= 0:
                (found.installed if name == INSTALLED else found.without).append(rate)
    return found


def rows_of(found: Rounds) -> list[dict[str, Cell]]:
    """Throughputs and their ratio."""
    ratios = sorted(found.ratios)
    return [
        {
            "rounds": len(ratios),
            "tokens/s installed": statistics.median(found.installed),
            "tokens/s without": statistics.median(found.without),
            "ratio median": statistics.median(ratios),
            "ratio lowest": ratios[0],
            "ratio highest": ratios[-1],
            "noise": found.noise,
        }
    ]


def draw(axes: Axes, found: Rounds) -> None:
    """A mark a round."""
    axes.plot(found.ratios, "o")
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set(xlabel="round", ylabel="throughput, installed and off / not loaded")
