"""A small Llama with random weights, made on the spot, for demos, tests and benches that need real engines.

The geometry is that of a real grouped-query model in small: head size 64, two KV heads, four layers, so that
the block arithmetic of the engines is exercised as it is in production. The weights are wide enough that
greedy decoding wanders through the vocabulary and never emits a special token; everything is float32, because
exact ties between logits are common in bfloat16 and would make two correct engines disagree.

The tokenizer is a byte-level BPE trained on ``corpus.txt``, which ships beside this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, SYSTEM, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class TinyLlama(msgspec.Struct, frozen=True, kw_only=True):
    """Shape and seed of the model. Two equal values give byte-equal files."""

    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    intermediate_size: int = 512
    vocabulary: int = 2048
    max_positions: int = 32768
    spread: float = 0.12
    """Standard deviation of every weight. Llama's usual 0.02 makes greedy output repeat one token."""
    embedding_spread: float | None = None
    """That of the embedding; None for ``spread``. At 1, and a small ``spread``, the residual stream of every
    layer is mostly the token's own embedding, so that equal tokens have alike keys."""
    attention_spread: float | None = None
    """Standard deviation of attention logits over unlike tokens; None for what ``spread`` gives. Under 1,
    attention is flat; at 4, a few hundredths of the tokens have most of the mass."""
    seed: int = 0

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes, all layers, keys and values, float32."""
        return self.layers * 2 * self.kv_heads * self.head_size * 4


def corpus() -> str:
    """The text that the tokenizer is trained on; also a source of prompts."""
    return resources.files("penstock.benchmarks").joinpath("corpus.txt").read_text(encoding="utf-8")


def ensure_model(spec: TinyLlama | None = None, *, cache: Path | None = None) -> Path:
    """Return the folder of the model, made at most once per specification, corpus and maker.

    Several processes may call this at the same moment: each writes a folder of its own and renames it, so a
    reader never sees half a model.

    Args:
        spec: shape and seed; the default model if absent.
        cache: parent folder; default ``$XDG_CACHE_HOME/penstock`` or ``~/.cache/penstock``.
    """
    spec = spec or TinyLlama()
    parent = cache or default_cache()
    target = parent / f"tiny-llama-{_fingerprint(spec)}"
    if target.is_dir():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".tiny-llama-", dir=parent))
    try:
        write_model(draft, spec)
        draft.chmod(0o755)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def default_cache() -> Path:
    """Folder for things that can be made again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "penstock"


def write_model(folder: Path, spec: TinyLlama) -> None:
    """Write ``config.json``, weights and tokenizer of ``spec`` into an existing folder."""
    from safetensors.numpy import save_file

    vocabulary = _write_tokenizer(folder, spec)
    _write_json(folder / "config.json", _config(spec, vocabulary))
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    save_file(dict(_weights(spec, vocabulary)), folder / "model.safetensors", metadata={"format": "pt"})


def _fingerprint(spec: TinyLlama) -> str:
    maker = Path(__file__).read_bytes()
    return hashlib.sha256(msgspec.json.encode(spec) + corpus().encode() + maker).hexdigest()[:12]


def _config(spec: TinyLlama, vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_size,
        "max_position_embeddings": spec.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def _weights(spec: TinyLlama, vocabulary: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(spec.seed)
    hidden, kv = spec.hidden_size, spec.kv_heads * spec.head_size
    # The norm before attention makes a query's and a key's channels ``query_key * hidden**0.5`` wide.
    query_key = None if spec.attention_spread is None else (spec.attention_spread / hidden) ** 0.5

    def normal(rows: int, columns: int, spread: float | None = None) -> NDArray[np.float32]:
        spread = spec.spread if spread is None else spread
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(spread)

    yield "model.embed_tokens.weight", normal(vocabulary, hidden, spec.embedding_spread)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", normal(hidden, hidden, query_key)
        yield prefix + "self_attn.k_proj.weight", normal(kv, hidden, query_key)
        yield prefix + "self_attn.v_proj.weight", normal(kv, hidden)
        yield prefix + "self_attn.o_proj.weight", normal(hidden, hidden)
        yield prefix + "mlp.gate_proj.weight", normal(spec.intermediate_size, hidden)
        yield prefix + "mlp.up_proj.weight", normal(spec.intermediate_size, hidden)
        yield prefix + "mlp.down_proj.weight", normal(hidden, spec.intermediate_size)
        yield prefix + "input_layernorm.weight", np.ones(hidden, np.float32)
        yield prefix + "post_attention_layernorm.weight", np.ones(hidden, np.float32)
    yield "model.norm.weight", np.ones(hidden, np.float32)
    head = normal(vocabulary, hidden)
    # A zero logit never is the largest of two thousand normal ones: the model does not stop by itself.
    head[: len(SPECIAL_TOKENS)] = 0.0
    yield "lm_head.weight", head


def _write_tokenizer(folder: Path, spec: TinyLlama) -> int:
    """Train and save the tokenizer; return the number of ids it uses."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": spec.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab_size()


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
