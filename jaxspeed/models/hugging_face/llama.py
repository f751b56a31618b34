"""Llama (Touvron et al., 2023) and Mistral (Jiang et al., 2023) files.

RMS norms, rope, grouped queries and a gated feed-forward; Qwen has the same layout.
"""

from typing import Any

from jaxspeed.models import layers as L
from jaxspeed.models.hugging_face.family import (
    Family,
    Json,
    activation_name,
    read,
    read_activation,
    refuse_other,
)
from jaxspeed.models.hugging_face.layout import Stored
from jaxspeed.models.transformer import DecoderConfig

PREFIX = "model."
ROPE_TYPES = ("default", "linear", "llama3")


def _layer(name: str, dims: str) -> Stored:
    return Stored(PREFIX + "layers.{}." + name, dims)


TENSORS = {
    "embedding/tokens": Stored("model.embed_tokens.weight", "V D"),
    "layers/attention_norm/scale": _layer("input_layernorm.weight", "D"),
    "layers/attention/query": _layer("self_attn.q_proj.weight", "(H K) D"),
    "layers/attention/key": _layer("self_attn.k_proj.weight", "(G K) D"),
    "layers/attention/value": _layer("self_attn.v_proj.weight", "(G K) D"),
    "layers/attention/out": _layer("self_attn.o_proj.weight", "D (H K)"),
    "layers/attention/query_bias": _layer("self_attn.q_proj.bias", "(H K)"),
    "layers/attention/key_bias": _layer("self_attn.k_proj.bias", "(G K)"),
    "layers/attention/value_bias": _layer("self_attn.v_proj.bias", "(G K)"),
    "layers/attention/out_bias": _layer("self_attn.o_proj.bias", "D"),
    "layers/attention/query_norm/scale": _layer("self_attn.q_norm.weight", "K"),
    "layers/attention/key_norm/scale": _layer("self_attn.k_norm.weight", "K"),
    "layers/feed_forward_norm/scale": _layer("post_attention_layernorm.weight", "D"),
    "layers/feed_forward/gate": _layer("mlp.gate_proj.weight", "F D"),
    "layers/feed_forward/up": _layer("mlp.up_proj.weight", "F D"),
    "layers/feed_forward/down": _layer("mlp.down_proj.weight", "D F"),
    "head/norm/scale": Stored("model.norm.weight", "D"),
    "head/projection": Stored("lm_head.weight", "V D"),
}


def read_gated(raw: Json, **attention: Any) -> DecoderConfig:
    """The configuration of a Llama-like model with this attention."""
    return DecoderConfig(
        vocab_size=read(raw, "vocab_size", int),
        dim=read(raw, "hidden_size", int),
        num_layers=read(raw, "num_hidden_layers", int),
        attention=L.AttentionConfig(**attention),
        feed_forward=L.FeedForwardConfig(
            hidden_dim=read(raw, "intermediate_size", int),
            activation=read_activation(raw, "hidden_act", "silu"),
        ),
        norm=L.NormConfig("rms", read(raw, "rms_norm_eps", float, 1e-6)),
        position=_read_rope(raw),
        tied=read(raw, "tie_word_embeddings", bool, False),
    )


def write_gated(config: DecoderConfig) -> Json:
    """The keys that all Llama-like models have."""
    attention = config.attention
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.feed_forward.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": activation_name(config.feed_forward.activation),
        "rms_norm_eps": config.norm.epsilon,
        "tie_word_embeddings": config.tied,
        **_write_rope(config.position),
    }


def read_heads(
    raw: Json, kv_heads: int | None = None, head_dim: int | None = None
) -> Json:
    """Numbers of heads and their size; the arguments are the family's defaults.

    An absent `num_key_value_heads` is the family's, null is as many as there are heads.
    """
    heads = read(raw, "num_attention_heads", int)
    if kv_heads is None or "num_key_value_heads" in raw:
        kv_heads = heads
    if head_dim is None:
        head_dim = read(raw, "hidden_size", int) // heads
    return {
        "heads": heads,
        "kv_heads": read(raw, "num_key_value_heads", int, kv_heads),
        "head_dim": read(raw, "head_dim", int, head_dim),
    }


def read_window(raw: Json) -> int | None:
    """`sliding_window`: null is none, absent is 4096."""
    if "sliding_window" in raw and raw["sliding_window"] is None:
        return None
    return read(raw, "sliding_window", int, 4096)


def _read_rope(raw: Json) -> L.PositionConfig:
    """Rope as version 4 of `transformers` writes it, or version 5."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        raise ValueError(f"{key} is {rope!r}; one flat object is supported")
    rope = {"rope_theta": raw.get("rope_theta")} | rope
    refuse_other(f"{key}.partial_rotary_factor", rope.get("partial_rotary_factor"), 1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"{key}.rope_type is {kind!r}; supported are {ROPE_TYPES}")
    length = read(raw, "max_position_embeddings", int, 2048)
    options: Json = {
        "max_length": length,
        "theta": read(rope, "rope_theta", float, 10000.0),
    }
    if kind != "default":
        options |= {"scaling": kind, "factor": read(rope, "factor", float)}
    if kind == "llama3":
        options |= {
            "low_frequency": read(rope, "low_freq_factor", float),
            "high_frequency": read(rope, "high_freq_factor", float),
            "original_length": read(
                rope, "original_max_position_embeddings", int, length
            ),
        }
    return L.PositionConfig(kind="rope", **options)


def _write_rope(position: L.PositionConfig) -> Json:
    """Rope for version 4 and version 5."""
    scaling: Json | None = None
    if position.scaling != "none":
        scaling = {"rope_type": position.scaling, "factor": position.factor}
    if scaling is not None and position.scaling == "llama3":
        scaling |= {
            "low_freq_factor": position.low_frequency,
            "high_freq_factor": position.high_frequency,
            "original_max_position_embeddings": position.original_length,
        }
    return {
        "max_position_embeddings": position.max_length,
        "rope_theta": position.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": position.theta}
        | (scaling or {"rope_type": "default"}),
    }


def _read_llama(raw: Json) -> DecoderConfig:
    dim, heads = read(raw, "hidden_size", int), read(raw, "num_attention_heads", int)
    if dim % heads:
        raise ValueError(
            f"hidden_size={dim} is not a multiple of num_attention_heads={heads}; "
            "transformers demands it of this family whatever head_dim is"
        )
    bias = read(raw, "attention_bias", bool, False)
    return read_gated(raw, **read_heads(raw), qkv_bias=bias, out_bias=bias)


def _write_llama(config: DecoderConfig) -> Json:
    return write_gated(config) | {
        "attention_bias": config.attention.qkv_bias,
        "mlp_bias": False,
    }


def _read_mistral(raw: Json) -> DecoderConfig:
    return read_gated(raw, **read_heads(raw, kv_heads=8), window=read_window(raw))


def _write_mistral(config: DecoderConfig) -> Json:
    return write_gated(config) | {"sliding_window": config.attention.window}


LLAMA = Family("LlamaForCausalLM", _read_llama, _write_llama, PREFIX, TENSORS)
MISTRAL = Family("MistralForCausalLM", _read_mistral, _write_mistral, PREFIX, TENSORS)
