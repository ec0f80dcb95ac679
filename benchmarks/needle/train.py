"""Trains the needle from scratch: ``python -m penstock.benchmarks.needle.train --out FOLDER``.

Sequences have 64 to 512 tokens, with the distances of 16k tokens from the beginning, and attention as
diluted as there from the second stage on (``lessons.py``). Training is seeded, its state is written down
every hundred steps, and a run that was broken off goes on where it stopped, with the result it would have
had.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.needle.checkpoint import save
from penstock.benchmarks.needle.lessons import IGNORED, Batch, Lesson, make_batch
from penstock.benchmarks.needle.model import NeedleModel, NeedleShape

STATE = "training.pt"
SAVE_EVERY = 100


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """So many steps of one kind of lesson."""

    lesson: Lesson
    steps: int
    sequences: int
    rate: float
    """Highest learning rate; it rises over 5 % of the steps and falls over the last 30 %."""


FAR = 16384
"""Longest distance that is trained for, in tokens."""
STAGES: tuple[Stage, ...] = (
    Stage(lesson=Lesson(length=64, span=FAR), steps=600, sequences=16, rate=3e-3),
    Stage(lesson=Lesson(length=128, span=FAR, weight=300.0), steps=400, sequences=16, rate=3e-3),
    Stage(lesson=Lesson(length=256, span=FAR, weight=300.0), steps=500, sequences=8, rate=3e-3),
    Stage(lesson=Lesson(length=128, span=FAR, weight=300.0, needles=0.3), steps=500, sequences=16, rate=3e-3),
    Stage(lesson=Lesson(length=512, span=FAR, weight=300.0), steps=100, sequences=4, rate=2e-3),
    Stage(lesson=Lesson(length=256, span=FAR, weight=300.0, needles=0.4), steps=500, sequences=8, rate=3e-3),
)


class Progress(msgspec.Struct):
    """Where a training stands."""

    stage: int = 0
    step: int = 0
    """Steps done in the stage."""
    seconds: float = 0.0
    """Processor time so far."""


class Trainer:
    """Model, optimizer and progress of one training."""

    def __init__(self, seed: int, stages: Sequence[Stage] = STAGES, shape: NeedleShape | None = None) -> None:
        self.seed, self.stages = seed, tuple(stages)
        self.model = NeedleModel(shape or NeedleShape(), torch.Generator().manual_seed(seed))
        self.optimizers = _optimizers(self.model)
        self.progress = Progress()

    def run(self) -> Iterator[dict[str, float]]:
        """Do what is left, one step an item: its loss and the share of answer tokens that were right."""
        while self.progress.stage < len(self.stages):
            stage = self.stages[self.progress.stage]
            while self.progress.step < stage.steps:
                began = time.process_time()
                found = self._step(stage)
                self.progress.step += 1
                self.progress.seconds += time.process_time() - began
                yield found
            self.progress.stage += 1
            self.progress.step = 0

    def save(self, file: Path) -> None:
        """Write everything that going on needs; a reader never sees half of it."""
        draft = file.with_suffix(".part")
        state = {
            "seed": self.seed,
            "stages": self._begun(),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": msgspec.structs.asdict(self.progress),
        }
        torch.save(state, draft)
        os.replace(draft, file)

    def resume(self, file: Path) -> None:
        """Go on from ``save``. Stages that were not begun may be others now.

        Raises:
            ValueError: that training had another seed, or began other stages.
        """
        state = torch.load(file, weights_only=True)
        self.progress = Progress(**state["progress"])
        if (state["seed"], state["stages"]) != (self.seed, self._begun()):
            raise ValueError(
                f"{file} belongs to a training with another seed or other stages; use another folder"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, found in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(found)

    def _begun(self) -> str:
        return msgspec.json.encode(self.stages[: self.progress.stage + (self.progress.step > 0)]).decode()

    def _step(self, stage: Stage) -> dict[str, float]:
        at, of = self.progress.step + 1, stage.steps
        rate = stage.rate * min(1.0, at / (0.05 * of), (of - at + 1) / (0.3 * of))
        seed = (self.seed * 1000 + self.progress.stage) * 1_000_000 + self.progress.step
        batch = make_batch(stage.lesson, stage.sequences, seed)
        loss, right = _loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss.item(), "right": right}


def _optimizers(model: NeedleModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms.

    AdamW alone takes several times as many steps before it matches keys at all.
    """
    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "layers" in name]
    outer = [weight for name, weight in model.named_parameters() if weight.ndim < 2 or "layers" not in name]
    muon = torch.optim.Muon(
        inner, momentum=0.9, ns_steps=4, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.0)]


def _loss(model: NeedleModel, batch: Batch) -> tuple[Tensor, float]:
    asked = batch.targets != IGNORED
    targets = batch.targets[asked]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(model.hidden(batch.tokens, batch.positions, batch.log_weights)[asked])
    loss = functional.cross_entropy(logits.float(), targets)
    return loss, (logits.argmax(-1) == targets).float().mean().item()


def card(trainer: Trainer) -> dict[str, object]:
    """How the checkpoint came about, for ``card.json``."""
    tokens = sum(stage.steps * stage.sequences * stage.lesson.length for stage in trainer.stages)
    return {
        "made_by": "python -m penstock.benchmarks.needle.train",
        "seed": trainer.seed,
        "training_tokens": tokens,
        "cpu_seconds": round(trainer.progress.seconds),
        "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
        "stages": msgspec.to_builtins(trainer.stages),
    }


@click.command("train")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of checkpoint and state.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(out: Path, seed: int, threads: int) -> None:
    """Train the needle, or go on where a training in the same folder stopped."""
    console = Console()
    torch.set_num_threads(threads)
    trainer = Trainer(seed)
    out.mkdir(parents=True, exist_ok=True)
    if (out / STATE).exists():
        trainer.resume(out / STATE)
    with Narrator(console).step("needle") as tell:
        for found in trainer.run():
            at = trainer.progress
            tell(f"stage {at.stage + 1} of {len(trainer.stages)}, step {at.step}, {_figures(found)}")
            if at.step % SAVE_EVERY == 0:
                trainer.save(out / STATE)
    trainer.save(out / STATE)
    save(trainer.model, out, card(trainer))
    console.print(f"wrote {out}")


def _figures(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


if __name__ == "__main__":
    main()
