from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from penstock.benchmarks.tiny_model import SPECIAL_TOKENS, TinyLlama, corpus, ensure_model

tokenizers = pytest.importorskip("tokenizers", reason="comes with an engine")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="comes with an engine")

SMALL = TinyLlama(layers=1, intermediate_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_model(SMALL, cache=tmp_path_factory.mktemp("models"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_equal_specifications_give_equal_files(folder, tmp_path):
    assert contents(ensure_model(SMALL, cache=tmp_path)) == contents(folder)


def test_another_seed_gives_another_model_beside_the_first(folder):
    other = ensure_model(TinyLlama(layers=1, intermediate_size=64, seed=1), cache=folder.parent)
    assert other != folder
    assert contents(other)["model.safetensors"] != contents(folder)["model.safetensors"]


def test_makers_that_race_agree_and_leave_nothing_behind(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: ensure_model(SMALL, cache=tmp_path), range(4)))
    assert len(folders) == 1
    assert list(tmp_path.iterdir()) == list(folders)


def test_a_failed_attempt_leaves_no_half_model(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.benchmarks.tiny_model._config", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure_model(SMALL, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_fit_the_configuration(folder):
    config = json.loads((folder / "config.json").read_text())
    weights = safetensors_numpy.load_file(folder / "model.safetensors")
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (
        config["num_key_value_heads"] * config["head_dim"],
        config["hidden_size"],
    )
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}


def test_special_tokens_can_never_be_the_most_likely(folder):
    head = safetensors_numpy.load_file(folder / "model.safetensors")["lm_head.weight"]
    assert not head[: len(SPECIAL_TOKENS)].any()
    assert head[len(SPECIAL_TOKENS) :].any(axis=1).all()


@pytest.mark.parametrize("text", [corpus()[:500], "größer 漢字 \U0001f30a", "", "\x00\n\t  "])
def test_the_tokenizer_returns_any_text(folder, text):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == 0
    assert tokenizer.decode(encoded.ids) == text
    assert max(encoded.ids) < json.loads((folder / "config.json").read_text())["vocab_size"]
