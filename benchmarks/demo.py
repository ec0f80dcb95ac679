"""``penstock demo``: prefill and decode apart, on this machine, compared with one plain server.

Starts stock vLLM servers, sends the same chat and completion requests through each setup with the official
``openai`` client, and compares token by token. Setups run one after the other, so that the machine needs room
for two engines at a time.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import msgspec
from rich.console import Console

from penstock.benchmarks.asks import Answer, Ask, AskError, ask_all, ask_together, churn_asks, sample_asks
from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.processes import Progress, ServerError, termination_unwinds
from penstock.benchmarks.report import Cell, Claim, Environment, Report
from penstock.benchmarks.scrape import Transfers, settled
from penstock.benchmarks.servers import Engine, console_script, engine_server, serving, serving_pair
from penstock.benchmarks.tiny_model import ensure_model

PLAIN = "plain"
FLOWKV = "flowkv"
STOCK = "NixlConnector"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one setup answered, and what its decode server moved meanwhile."""

    setup: str
    answers: tuple[Answer, ...]
    moved: Transfers | None = None

    def equal(self, reference: Outcome) -> int:
        """Number of answers whose tokens are those of ``reference``."""
        pairs = zip(self.answers, reference.answers, strict=True)
        return sum(bool(mine.token_ids) and mine.token_ids == its.token_ids for mine, its in pairs)

    @property
    def first_token_s(self) -> float:
        """Median time to the first token of the streamed answers."""
        return statistics.median(a.first_token_s for a in self.answers if a.first_token_s is not None)


class Stage:
    """Runs setups, one at a time, and says what it is doing."""

    def __init__(self, narrator: Narrator, template: Engine, logs: Path) -> None:
        self._narrator = narrator
        self._template = template
        self._logs = logs

    def plain(self, asks: Sequence[Ask]) -> Outcome:
        """One server that does prefill and decode."""
        server = engine_server(msgspec.structs.replace(self._template, name=PLAIN), self._logs)
        with contextlib.ExitStack() as stack:
            with self._narrator.step(f"{PLAIN}: starting one server") as tell:
                stack.enter_context(serving([server], progress=_waiting(tell)))
            self._churn(PLAIN, server.url)
            answers = self._ask(PLAIN, server.url, asks)
        return Outcome(setup=PLAIN, answers=tuple(answers))

    def apart(self, connector: str, asks: Sequence[Ask]) -> Outcome:
        """A prefill and a decode server with ``connector``, and the proxy before them."""
        with contextlib.ExitStack() as stack:
            with self._narrator.step(f"{connector}: starting two servers and the proxy") as tell:
                pair = stack.enter_context(
                    serving_pair(self._template, connector, self._logs, progress=_waiting(tell))
                )
            self._churn(connector, pair.url)
            before = settled(pair.decode.url, connector)
            answers = self._ask(connector, pair.url, asks)
            moved = settled(pair.decode.url, connector) - before
        return Outcome(setup=connector, answers=tuple(answers), moved=moved)

    def _churn(self, what: str, url: str) -> None:
        """Wear the block pool as traffic does; an engine that has just started hands out blocks in order."""
        asks = churn_asks()
        with self._narrator.step(f"{what}: {len(asks)} mixed requests to wear the block pool"):
            ask_together(url, self._template.model, asks, retries=5)

    def _ask(self, what: str, url: str, asks: Sequence[Ask]) -> list[Answer]:
        with self._narrator.step(f"{what}: the {len(asks)} requests that are compared") as tell:
            return ask_all(url, self._template.model, asks, done=lambda count: tell(f"{count} answered"))


def _waiting(tell: Callable[[str], None]) -> Progress:
    return lambda name, seconds: tell(f"waiting for {name}, {seconds:.0f} s")


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Cell]]:
    """One row for each setup; the first is the reference."""
    reference = outcomes[0]
    rows: list[dict[str, Cell]] = []
    for outcome in outcomes:
        moved = outcome.moved or Transfers()
        transfer_s, post_s = moved.each(moved.transfer_s), moved.each(moved.post_s)
        rows.append(
            {
                "setup": outcome.setup,
                "requests": len(outcome.answers),
                "tokens equal": outcome.equal(reference),
                "TTFT median ms": outcome.first_token_s * 1e3,
                "transfers": moved.count,
                "descriptors each": moved.each(moved.descriptors),
                "KiB each": None if outcome.moved is None else (moved.each(moved.bytes) or 0) / 1024,
                "transfer ms": None if transfer_s is None else transfer_s * 1e3,
                "post ms": None if post_s is None else post_s * 1e3,
            }
        )
    return rows


def judge(outcomes: Sequence[Outcome]) -> tuple[Claim, ...]:
    """Every answer equal to the plain server's, and every prompt moved rather than computed twice."""
    reference = outcomes[0]
    claims = []
    for outcome in outcomes[1:]:
        asked = len(outcome.answers)
        claims.append(Claim.of(f"{outcome.setup}: answers equal", outcome.equal(reference), "==", asked))
        moved = outcome.moved.count if outcome.moved else 0
        claims.append(Claim.of(f"{outcome.setup}: prompts moved", moved, "==", asked))
    return tuple(claims)


@click.command()
@click.option(
    "--model", help="A folder or a name on the Hugging Face hub.  [default: a tiny model, made here]"
)
@click.option("--max-model-len", default=8192, show_default=True, help="Context of the servers, in tokens.")
@click.option("--connector", "connectors", multiple=True, default=(STOCK, FLOWKV), show_default=True)
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the servers' logs in this folder.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result to this file.")
def demo(
    model: str | None,
    max_model_len: int,
    connectors: tuple[str, ...],
    logs: Path | None,
    json_file: Path | None,
) -> None:
    """Compare prefill and decode apart with one plain server, on this machine.

    Exits with 1 if any answer differs or a server fails.
    """
    console = Console()
    folder = logs or Path(tempfile.mkdtemp(prefix="penstock-demo-"))
    try:
        console_script("vllm")
        template = Engine(model=model or str(ensure_model()), max_model_len=max_model_len)
        with termination_unwinds():
            report = _run(Stage(Narrator(console), template, folder), connectors)
    except (AskError, ServerError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        console.print(f"logs: {folder}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print(f"interrupted; logs: {folder}", soft_wrap=True)
        sys.exit(130)
    report.show(console, title="the same requests through each setup", across="setup")
    if json_file is not None:
        report.write_json(json_file)
    if not report.holds:
        console.print(f"something differs; logs: {folder}", style="bold red")
        sys.exit(1)
    if logs is None:
        shutil.rmtree(folder, ignore_errors=True)


def _run(stage: Stage, connectors: Sequence[str]) -> Report:
    asks = sample_asks()
    outcomes = [stage.plain(asks), *(stage.apart(connector, asks) for connector in connectors)]
    return Report(
        bench="demo",
        environment=Environment.detect(seed=0),
        rows=tuple(summary(outcomes)),
        claims=judge(outcomes),
    )
