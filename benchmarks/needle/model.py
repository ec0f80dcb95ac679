"""The Llama architecture in plain torch, as small as the needle needs it, with RoPE positions given by hand.

Parameters have the names and layouts of Hugging Face's ``LlamaForCausalLM``, so that a state dict is a
checkpoint. What is here and not there: positions and log-weights of keys are arguments, which lets short
sequences be trained as if they were long ones (``lessons.py``), and queries and keys can be captured.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from penstock.benchmarks.needle.task import VOCABULARY

CONFIG_NAMES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "vocabulary": "vocab_size",
    "max_positions": "max_position_embeddings",
}
"""Names of the shape's fields in ``config.json``, where they differ."""

LOOK_BACK = 1.5
"""Weight of a fixed distance in the first layer's scores at the start: that key gets a share of 0.7."""


class NeedleShape(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of the model. Head size and grouping are those of models in production."""

    layers: int = 3
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 64
    hidden_size: int = 128
    intermediate_size: int = 256
    vocabulary: int = VOCABULARY
    max_positions: int = 32768
    rope_theta: float = 1e20
    """So large that two thirds of a head hardly turn within the context: content is matched there."""
    rms_norm_eps: float = 1e-5

    @classmethod
    def of(cls, config: dict[str, Any]) -> NeedleShape:
        """The shape of a checkpoint's ``config.json``."""
        return cls(**{name: config[CONFIG_NAMES.get(name, name)] for name in cls.__struct_fields__})

    def config(self) -> dict[str, object]:
        """``config.json`` of a checkpoint."""
        shape = msgspec.structs.asdict(self)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            **{CONFIG_NAMES.get(name, name): value for name, value in shape.items()},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }


class Attended(msgspec.Struct, frozen=True):
    """What one layer's attention works on, RoPE applied, for one prompt of T tokens."""

    queries: Tensor
    """[heads, T, head_size]; query head h reads KV head ``h // (heads // kv_heads)``."""
    keys: Tensor
    """[kv_heads, T, head_size]."""
    values: Tensor
    """[kv_heads, T, head_size]."""


class Rotary:
    """RoPE in Llama's half-split form for given positions [batch, T]."""

    def __init__(self, positions: Tensor, shape: NeedleShape) -> None:
        half = torch.arange(0, shape.head_size, 2, dtype=torch.float32, device=positions.device)
        angles = positions[..., None].float() / shape.rope_theta ** (half / shape.head_size)
        self._cos = torch.cat((angles, angles), -1).cos()[:, None]
        self._sin = torch.cat((angles, angles), -1).sin()[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """Turn [batch, heads, T, head_size]."""
        low, high = x.chunk(2, dim=-1)
        return x * self._cos.to(x.dtype) + torch.cat((-high, low), -1) * self._sin.to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, shape: NeedleShape) -> None:
        super().__init__()
        self._shape = shape
        width, kv_width = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [batch, T, hidden], each [batch, its heads, T, head_size]."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self._shape.head_size)).transpose(1, 2)

        return rotary(split(self.q_proj(x))), rotary(split(self.k_proj(x))), split(self.v_proj(x))

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None) -> Tensor:
        """x [batch, T, hidden]; mask is added to the scores, [batch, 1, 1, T, T]; causal if absent."""
        query, key, value = self.project(x, rotary)
        groups = self._shape.heads // self._shape.kv_heads
        if mask is None:
            mixed = functional.scaled_dot_product_attention(
                query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), is_causal=True
            )
        else:
            # At a few hundred tokens plain products are several times faster than torch's fused CPU kernel.
            grouped = (query * self._shape.head_size**-0.5).unflatten(1, (-1, groups)).flatten(2, 3)
            scores = (grouped @ key.transpose(-1, -2)).unflatten(2, (groups, -1))
            shares = (scores + mask.to(scores.dtype)).softmax(-1).flatten(2, 3)
            mixed = (shares @ value).unflatten(2, (groups, -1)).flatten(1, 2)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: NeedleShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, T, hidden]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: NeedleShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = SelfAttention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None) -> Tensor:
        """x [batch, T, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, shape: NeedleShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class NeedleModel(nn.Module):
    """The model; its state dict has the names of a Llama checkpoint with tied embeddings."""

    def __init__(self, shape: NeedleShape, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        with torch.no_grad():
            self._quieten()
            self._look_back()

    def _quieten(self) -> None:
        """Let the token itself stand out from what the first layer adds to it."""
        self.model.embed_tokens.weight.mul_(2.5)
        for layer in self.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.6)
            layer.mlp.down_proj.weight.mul_(0.5)

    def _look_back(self) -> None:
        """Start the first layer with heads that attend a fixed distance back, head n by ``n % 4`` tokens.

        Every retrieval circuit here needs such heads, and learning them takes most of the time otherwise. All
        tokens share one component; keys turn it into one constant vector, queries into the same vector turned
        by RoPE's angles of the distance.
        """
        shape = self.shape
        size = shape.head_size
        frequencies = shape.rope_theta ** (-torch.arange(size // 2) * 2 / size)
        turning = (frequencies > 1e-3) * LOOK_BACK
        attention = self.model.layers[0].self_attn
        self.model.embed_tokens.weight[:, 0] = 1.2
        attention.q_proj.weight.mul_(0.2)
        attention.k_proj.weight.mul_(0.2)
        for head in range(shape.kv_heads):
            attention.k_proj.weight[head * size :][: size // 2, 0] = turning
        for head in range(shape.heads):
            angles = -frequencies * (head % 4)
            constant = torch.cat((turning * angles.cos(), turning * angles.sin()))
            attention.q_proj.weight[head * size :][:size, 0] = constant

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, log_weights: Tensor | None = None
    ) -> Tensor:
        """Normed last states [batch, T, hidden] of tokens [batch, T].

        Args:
            tokens: ids.
            positions: RoPE positions [batch, T]; 0, 1, 2, ... if absent.
            log_weights: [batch, T], added to every score of that key: a key of log-weight log(n) counts as n
                equal keys.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rotary = Rotary(positions, self.shape)
        mask = None if log_weights is None else causal_mask(log_weights)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, rotary, mask)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., vocabulary] of states [..., hidden]."""
        return functional.linear(hidden, self.model.embed_tokens.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, T, vocabulary] of tokens [batch, T]."""
        return self.logits(self.hidden(tokens))


def causal_mask(log_weights: Tensor) -> Tensor:
    """Additive mask [batch, 1, 1, T, T] of keys' log-weights [batch, T]; -inf above the diagonal."""
    length = log_weights.shape[1]
    above = torch.full((length, length), float("-inf"), device=log_weights.device).triu(1)
    return log_weights[:, None, None, None, :] + above


def capture(model: NeedleModel, tokens: Tensor) -> list[Attended]:
    """Queries, keys and values of every layer, in order, for one prompt; tokens [T]."""
    rotary = Rotary(torch.arange(len(tokens), device=tokens.device)[None], model.shape)
    found = []
    with torch.inference_mode():
        x = model.model.embed_tokens(tokens[None])
        for layer in model.model.layers:
            query, key, value = layer.self_attn.project(layer.input_layernorm(x), rotary)
            found.append(Attended(query[0], key[0], value[0]))
            x = layer(x, rotary, None)
    return found
