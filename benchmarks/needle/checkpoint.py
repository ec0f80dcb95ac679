"""The trained needle as a Hugging Face checkpoint: the one that ships, and how one is written and read."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from safetensors.torch import load_file, save_file

from penstock.benchmarks.needle.model import NeedleModel, NeedleShape
from penstock.benchmarks.needle.task import words

WEIGHTS = "model.safetensors"
CARD = "card.json"
BOS, EOS, PAD = words()[:3]


def shipped() -> Path:
    """Folder of the checkpoint that comes with the package; a path that engines can open."""
    return Path(str(resources.files("penstock.benchmarks.needle").joinpath("weights")))


def save(model: NeedleModel, folder: Path, card: dict[str, object]) -> None:
    """Write weights, configuration, tokenizer and the card, which says how the model came about.

    Weights are stored in bfloat16, to be half as large, and computed with in float32, as the configuration
    says, because two engines that round otherwise would disagree over close answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().bfloat16().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    shape = model.shape
    _write(folder / "config.json", shape.config())
    _write(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    _write(folder / CARD, card)
    _write_tokenizer(folder, shape)


def load(folder: Path | None = None) -> NeedleModel:
    """The model of a checkpoint, in float32; the shipped one by default."""
    folder = folder or shipped()
    model = NeedleModel(NeedleShape.of(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    weights = load_file(folder / WEIGHTS)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval()


def _write_tokenizer(folder: Path, shape: NeedleShape) -> None:
    """One token a word, words apart by blanks; ``<s>`` comes before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / "tokenizer_config.json", settings)


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
