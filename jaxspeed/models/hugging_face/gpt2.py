"""GPT-2 files (Radford et al., 2019): learned positions, fused queries, keys, values.

Weights are stored [in, out], unlike those of every other family.
"""

from jaxspeed.models import layers as L
from jaxspeed.models.hugging_face.family import (
    Family,
    Json,
    activation_name,
    read,
    read_activation,
)
from jaxspeed.models.hugging_face.layout import Stored
from jaxspeed.models.transformer import DecoderConfig


def _layer(name: str, dims: str, part: int = 0) -> Stored:
    return Stored("transformer.h.{}." + name, dims, part)


TENSORS = {
    "embedding/tokens": Stored("transformer.wte.weight", "V D"),
    "embedding/positions": Stored("transformer.wpe.weight", "P D"),
    "layers/attention_norm/scale": _layer("ln_1.weight", "D"),
    "layers/attention_norm/bias": _layer("ln_1.bias", "D"),
    "layers/attention/query": _layer("attn.c_attn.weight", "D (3 H K)", 0),
    "layers/attention/key": _layer("attn.c_attn.weight", "D (3 G K)", 1),
    "layers/attention/value": _layer("attn.c_attn.weight", "D (3 G K)", 2),
    "layers/attention/query_bias": _layer("attn.c_attn.bias", "(3 H K)", 0),
    "layers/attention/key_bias": _layer("attn.c_attn.bias", "(3 G K)", 1),
    "layers/attention/value_bias": _layer("attn.c_attn.bias", "(3 G K)", 2),
    "layers/attention/out": _layer("attn.c_proj.weight", "(H K) D"),
    "layers/attention/out_bias": _layer("attn.c_proj.bias", "D"),
    "layers/feed_forward_norm/scale": _layer("ln_2.weight", "D"),
    "layers/feed_forward_norm/bias": _layer("ln_2.bias", "D"),
    "layers/feed_forward/up": _layer("mlp.c_fc.weight", "D F"),
    "layers/feed_forward/up_bias": _layer("mlp.c_fc.bias", "F"),
    "layers/feed_forward/down": _layer("mlp.c_proj.weight", "F D"),
    "layers/feed_forward/down_bias": _layer("mlp.c_proj.bias", "D"),
    "head/norm/scale": Stored("transformer.ln_f.weight", "D"),
    "head/norm/bias": Stored("transformer.ln_f.bias", "D"),
    "head/projection": Stored("lm_head.weight", "V D"),
}


def _read(raw: Json) -> DecoderConfig:
    dim, heads = read(raw, "n_embd", int), read(raw, "n_head", int)
    return DecoderConfig(
        vocab_size=read(raw, "vocab_size", int),
        dim=dim,
        num_layers=read(raw, "n_layer", int),
        attention=L.AttentionConfig(
            heads, heads, dim // heads, qkv_bias=True, out_bias=True
        ),
        feed_forward=L.FeedForwardConfig(
            hidden_dim=read(raw, "n_inner", int, 4 * dim),
            activation=read_activation(raw, "activation_function", "gelu_new"),
            gated=False,
            bias=True,
        ),
        norm=L.NormConfig("layer", read(raw, "layer_norm_epsilon", float, 1e-5)),
        position=L.PositionConfig("learned", read(raw, "n_positions", int, 1024)),
        tied=read(raw, "tie_word_embeddings", bool, True),
    )


def _write(config: DecoderConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.dim,
        "n_layer": config.num_layers,
        "n_head": config.attention.heads,
        "n_inner": config.feed_forward.hidden_dim,
        "n_positions": config.position.max_length,
        "activation_function": activation_name(config.feed_forward.activation),
        "layer_norm_epsilon": config.norm.epsilon,
        "tie_word_embeddings": config.tied,
    }


GPT2 = Family(
    "GPT2LMHeadModel",
    _read,
    _write,
    "transformer.",
    TENSORS,
    {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)
