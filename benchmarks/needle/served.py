"""The needle's answers from stock ``vllm serve``, and from one with ``--sparse-attention tactic``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from penstock.benchmarks.flowkv_part import Finding, Tell
from penstock.benchmarks.needle.answers import ServerScore, scores
from penstock.benchmarks.needle.checkpoint import shipped
from penstock.benchmarks.needle.dense import LEAST
from penstock.benchmarks.needle.pairs import Pairs, together
from penstock.benchmarks.needle.part import MASS, MOST_LOST, SERVING, NeedleOptions
from penstock.benchmarks.needle.task import TASKS, Task
from penstock.benchmarks.report import Claim
from penstock.benchmarks.scrape import by_label, samples
from penstock.benchmarks.servers import Engine, engine_server, serving
from penstock.kernels.sparse.serving import ServingConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from penstock.benchmarks.processes import Server

COUNTED = ("penstock_sparse_selections", "penstock_sparse_measurements")
Found = dict[tuple[Task, int], Pairs]


def measure(options: NeedleOptions, tell: Tell) -> Finding:
    """Every task and length through both servers, one after the other."""
    # One token more than whole blocks have, for ``ServerScore``.
    lengths = [length + 1 for length in options.lengths]
    # Room for the answer on top of the prompt.
    plain = Engine(
        model=str(options.folder or shipped()), name="needle-dense", max_model_len=max(lengths) + 63
    )
    asked = [(task, length) for length in lengths for task in TASKS]
    found: list[list[list[float]]] = []
    notes: list[str] = []
    for engine in (plain, sparse_engine(plain)):
        with tempfile.TemporaryDirectory(prefix="penstock-needle-") as logs:
            server = engine_server(engine, Path(logs))
            with serving([server]):
                score = ServerScore(server.url, engine.model, decoded=True)
                answers = []
                for task, length in asked:
                    tell(f"{engine.label}, {task} at {length:,} tokens")
                    answers.append(scores(task, length, options.prompts, options.seed, score))
                found.append(answers)
                notes = _notes(server)
    pairs = {key: Pairs(*both) for key, both in zip(asked, zip(*found, strict=True), strict=True)}
    return Finding(
        rows=[{"task": task, "tokens": length, **one.cells()} for (task, length), one in pairs.items()],
        claims=_claims(pairs),
        notes=notes,
        draw=lambda axes: _draw(axes, pairs),
    )


def sparse_engine(plain: Engine, config: ServingConfig = SERVING) -> Engine:
    """The same with sparse attention."""
    section = msgspec.to_builtins(config)
    return msgspec.structs.replace(
        plain,
        name="needle-sparse",
        arguments=(
            *plain.arguments,
            f"--sparse-attention={config.selector}",
            "--additional-config",
            json.dumps({"penstock": {"sparse_attention": section}}),
        ),
    )


def _notes(server: Server) -> list[str]:
    """What the sparse server exports about itself, at the end."""

    def shown(found: dict[str, float]) -> str:
        return ", ".join(f"{name}: {value:.4g}" for name, value in sorted(found.items())) or "none"

    read, pages = (
        by_label(server.url, f"penstock_sparse_{name}", "layer") for name in ("pages_read", "pages")
    )
    mass = by_label(server.url, "penstock_sparse_attained_mass", "quantile")
    dense = by_label(server.url, "penstock_sparse_dense_selections", "reason")
    return [
        f"attained mass by quantile, of query heads that do not read everything: {shown(mass)}",
        f"share of pages read by layer: {shown({layer: read[layer] / of for layer, of in pages.items()})}",
        f"dense by reason: {shown(dense)}",
        *(f"{name}: {value:g}" for name, value in samples(server.url).items() if name in COUNTED),
    ]


def _claims(pairs: Found) -> list[Claim]:
    claims = []
    for task in TASKS:
        mine = together([one for (name, _), one in pairs.items() if name == task])
        claims.append(
            Claim.of(f"{task}, vLLM, P = {MASS}: share of answers lost", mine.lost, "<=", MOST_LOST)
        )
        claims.append(Claim.of(f"{task}, vLLM, dense", sum(mine.dense) / len(mine.dense), ">=", LEAST))
    return claims


def _draw(axes: Axes, pairs: Found) -> None:
    lengths = sorted({length for _, length in pairs})
    for number, task in enumerate(TASKS):
        mine: Sequence[Pairs] = [pairs[task, length] for length in lengths]
        for way, style in (("dense", "-o"), ("sparse", "--x")):
            shares = [sum(found) / len(found) for found in (getattr(one, way) for one in mine)]
            axes.plot(lengths, shares, style, color=f"C{number}", label=f"{task}, {way}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("share of the references found")
    axes.legend(fontsize="small")
