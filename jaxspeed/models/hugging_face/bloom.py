"""BLOOM files (Workshop et al., 2022): ALiBi, a norm after the embedding.

Queries, keys and values are fused and interleaved by head.
"""

from jaxspeed.models import layers as L
from jaxspeed.models.hugging_face.family import Family, Json, read
from jaxspeed.models.hugging_face.layout import Stored
from jaxspeed.models.transformer import DecoderConfig


def _layer(name: str, dims: str, part: int = 0) -> Stored:
    return Stored("transformer.h.{}." + name, dims, part)


def _fused(name: str, dims: str, part: int) -> Stored:
    return _layer("self_attention.query_key_value." + name, dims, part)


TENSORS = {
    "embedding/tokens": Stored("transformer.word_embeddings.weight", "V D"),
    "embedding/norm/scale": Stored("transformer.word_embeddings_layernorm.weight", "D"),
    "embedding/norm/bias": Stored("transformer.word_embeddings_layernorm.bias", "D"),
    "layers/attention_norm/scale": _layer("input_layernorm.weight", "D"),
    "layers/attention_norm/bias": _layer("input_layernorm.bias", "D"),
    "layers/attention/query": _fused("weight", "(H 3 K) D", 0),
    "layers/attention/key": _fused("weight", "(G 3 K) D", 1),
    "layers/attention/value": _fused("weight", "(G 3 K) D", 2),
    "layers/attention/query_bias": _fused("bias", "(H 3 K)", 0),
    "layers/attention/key_bias": _fused("bias", "(G 3 K)", 1),
    "layers/attention/value_bias": _fused("bias", "(G 3 K)", 2),
    "layers/attention/out": _layer("self_attention.dense.weight", "D (H K)"),
    "layers/attention/out_bias": _layer("self_attention.dense.bias", "D"),
    "layers/feed_forward_norm/scale": _layer("post_attention_layernorm.weight", "D"),
    "layers/feed_forward_norm/bias": _layer("post_attention_layernorm.bias", "D"),
    "layers/feed_forward/up": _layer("mlp.dense_h_to_4h.weight", "F D"),
    "layers/feed_forward/up_bias": _layer("mlp.dense_h_to_4h.bias", "F"),
    "layers/feed_forward/down": _layer("mlp.dense_4h_to_h.weight", "D F"),
    "layers/feed_forward/down_bias": _layer("mlp.dense_4h_to_h.bias", "D"),
    "head/norm/scale": Stored("transformer.ln_f.weight", "D"),
    "head/norm/bias": Stored("transformer.ln_f.bias", "D"),
    "head/projection": Stored("lm_head.weight", "V D"),
}


def _read(raw: Json) -> DecoderConfig:
    dim, heads = read(raw, "hidden_size", int), read(raw, "n_head", int)
    return DecoderConfig(
        vocab_size=read(raw, "vocab_size", int),
        dim=dim,
        num_layers=read(raw, "n_layer", int),
        attention=L.AttentionConfig(
            heads, heads, dim // heads, qkv_bias=True, out_bias=True
        ),
        feed_forward=L.FeedForwardConfig(4 * dim, "gelu_tanh", gated=False, bias=True),
        norm=L.NormConfig("layer", read(raw, "layer_norm_epsilon", float, 1e-5)),
        position=L.PositionConfig("alibi", read(raw, "seq_length", int, 2048)),
        tied=read(raw, "tie_word_embeddings", bool, True),
        embedding_norm=True,
    )


def _write(config: DecoderConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "n_layer": config.num_layers,
        "n_head": config.attention.heads,
        "seq_length": config.position.max_length,
        "layer_norm_epsilon": config.norm.epsilon,
        "tie_word_embeddings": config.tied,
    }


BLOOM = Family(
    "BloomForCausalLM",
    _read,
    _write,
    "transformer.",
    TENSORS,
    {
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)
