"""config.json <-> DecoderConfig, and the two orders of the same numbers."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxspeed.models import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    NormConfig,
    PositionConfig,
    SparseConfig,
)
from jaxspeed.models.hugging_face.config import from_json, to_json
from jaxspeed.models.hugging_face.layout import Stored

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
BLOOM: dict[str, Any] = {
    "model_type": "bloom",
    "vocab_size": 1000,
    "n_embed": 64,
    "num_attention_heads": 8,
    "n_layer": 2,
    "offset_alibi": 100,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 1000,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
}


def test_absent_keys_of_llama_have_the_defaults_of_transformers():
    assert from_json(LLAMA) == DecoderConfig(
        vocab_size=1000,
        dim=64,
        num_layers=4,
        attention=AttentionConfig(heads=8, kv_heads=8, head_dim=8),
        feed_forward=FeedForwardConfig(hidden_dim=160, activation="silu"),
        norm=NormConfig("rms", 1e-6),
        position=PositionConfig("rope", 2048, 10000.0),
    )


@pytest.mark.parametrize(
    ("family", "given", "kv_heads", "head_dim", "window"),
    [
        ("llama", {}, 8, 8, None),
        ("mistral", {"num_attention_heads": 16}, 8, 4, 4096),
        ("mistral", {"num_key_value_heads": None, "sliding_window": None}, 8, 8, None),
        ("qwen2", {"num_attention_heads": 32}, 32, 2, None),
        ("qwen3", {"num_key_value_heads": 4}, 4, 128, None),
    ],
)
def test_defaults_of_each_family(family, given, kv_heads, head_dim, window):
    attention = from_json(LLAMA | {"model_type": family} | given).attention
    assert attention.kv_heads == kv_heads
    assert attention.head_dim == head_dim
    assert attention.window == window


def test_old_names_of_bloom_and_gpt2():
    bloom = from_json(BLOOM)
    assert (bloom.dim, bloom.attention.heads, bloom.num_layers) == (64, 8, 2)
    assert bloom.feed_forward == FeedForwardConfig(256, "gelu_tanh", False, True)
    assert bloom.tied and bloom.embedding_norm and bloom.position.kind == "alibi"
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads"}
    renamed = {names.get(key, key): value for key, value in GPT2.items()}
    assert from_json(renamed) == from_json(GPT2)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 500000, **LLAMA3}},
        {"rope_theta": 500000.0, "rope_parameters": LLAMA3, "rope_scaling": None},
    ],
)
def test_rope_of_both_major_versions(written):
    raw = LLAMA | {"max_position_embeddings": 131072} | written
    expected = PositionConfig("rope", 131072, 500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert from_json(raw).position == expected


def test_old_name_of_the_rope_type():
    raw = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}
    position = from_json(raw).position
    assert (position.scaling, position.factor, position.theta) == ("linear", 2.0, 1e4)


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        ({"use_sliding_window": True, "max_window_layers": 3}, (4096, (3,))),
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096, (0, 1, 2, 3))),
        ({"use_sliding_window": True}, (None, None)),  # 28 layers without
        ({"use_sliding_window": True, "sliding_window": None}, (None, None)),
        ({"use_sliding_window": False, "max_window_layers": 0}, (None, None)),
    ],
)
def test_windows_of_qwen(given, windows):
    qwen2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 8}
    attention = from_json(qwen2 | given).attention
    assert (attention.window, attention.window_layers) == windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mixtral"},
            r"model_type is 'mixtral'.*'bloom', 'gpt2', 'llama'",
        ),
        ({"model_type": None}, r"model_type is None .*families that can be read"),
        ({"vocab_size": None}, "vocab_size is missing; a llama model needs it"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be of type int"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; it must be of type int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; .* type bool"),
        (
            {"hidden_size": 66},
            "hidden_size=66 is not a multiple of num_attention_heads=8",
        ),
        ({"num_key_value_heads": 3}, "heads=8 is not a multiple of .*kv_heads=3"),
        ({"hidden_act": "xielu"}, r"hidden_act is 'xielu'; supported are \['gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is supported"),
        ({"num_experts": 8}, "num_experts is 8; only None is supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; only None"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"quantization_config is \{'quant_method': 'gptq'\}; only None",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_parameters.rope_type is 'yarn'; supported are .*'llama3'",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_scaling.rope_type is 'dynamic'",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters is .*; one flat object is supported",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            r"layer_types is \['full_attention'\]; .* each of the 4 layers",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4},
            "layer_types has 'sliding_attention', which needs use_sliding_window true",
        ),
    ],
)
def test_what_is_not_supported_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_json(LLAMA | changes)


def test_gpt2_and_bloom_features_that_are_refused():
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx is True"):
        from_json(GPT2 | {"scale_attn_by_inverse_layer_idx": True})
    with pytest.raises(ValueError, match="residual_connection_post_layernorm is True"):
        from_json(BLOOM | {"apply_residual_connection_post_layernorm": True})


MODEL = from_json(LLAMA)
ATTENTION = MODEL.attention


def replace(config: DecoderConfig = MODEL, **parts: Any) -> DecoderConfig:
    """`config` with fields of its parts replaced, `attention={"window": 4}`."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name, fields in parts.items()
        },
    )


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", MODEL),
        ("llama", replace(attention={"qkv_bias": True, "out_bias": True})),
        ("llama", replace(position={"scaling": "linear", "factor": 2.0})),
        ("llama", replace(position={"kind": "rope", "factor": 3.0})),  # no effect
        ("llama", replace(attention={"window_layers": (1,)})),  # no effect
        ("llama", replace(attention={"sparse": SparseConfig("local", layers=())})),
        ("mistral", replace(attention={"heads": 6, "kv_heads": 2})),  # 64 % 6
        ("mistral", replace(attention={"window": 16})),
        ("mistral", replace(attention={"window": 16, "window_layers": (0, 1, 2, 3)})),
        ("qwen2", replace(attention={"qkv_bias": True})),
        (
            "qwen2",
            replace(attention={"qkv_bias": True, "window": 4, "window_layers": (0, 2)}),
        ),
        ("qwen3", replace(attention={"qk_norm": True, "head_dim": 16})),
        ("gpt2", from_json(GPT2)),
        ("gpt2", replace(from_json(GPT2), feed_forward={"activation": "relu"})),
        ("bloom", from_json(BLOOM)),
    ],
)
def test_the_family_is_the_one_that_holds_the_model(family, config):
    raw = to_json(config)
    assert raw["model_type"] == family
    assert to_json(from_json(raw)) == raw


def test_rope_is_written_for_both_major_versions():
    raw = to_json(from_json(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3}))
    assert raw["rope_theta"] == 5e5
    assert raw["rope_scaling"] == LLAMA3
    assert raw["rope_parameters"] == {"rope_theta": 5e5, **LLAMA3}
    assert to_json(MODEL)["rope_scaling"] is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(norm={"kind": "layer"}),
            r"nearest is llama, which needs norm.kind='rms' \(it is 'layer'\)",
        ),
        (
            replace(attention={"window": 4, "window_layers": (0,)}),
            r"mistral, which needs attention.window_layers=None \(it is \(0,\)\)",
        ),
        (
            replace(from_json(BLOOM), feed_forward={"hidden_dim": 100}),
            r"bloom, which needs feed_forward.hidden_dim=256 \(it is 100\)",
        ),
        (
            replace(from_json(GPT2), attention={"kv_heads": 2}),
            r"gpt2, which needs attention.kv_heads=4 \(it is 2\)",
        ),
        (
            dataclasses.replace(MODEL, embedding_norm=True),
            r"llama, which needs embedding_norm=False \(it is True\)",
        ),
    ],
)
def test_a_model_that_no_family_holds(config, message):
    with pytest.raises(ValueError, match=message):
        to_json(config)


class Recorder:
    """An array that notes how it is sliced."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.reads = array, []

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        self.reads.append([(each.start, each.stop) for each in index])
        return self.array[index]


SIZES = {"D": 4, "H": 3, "G": 3, "K": 2, "V": 5}


@pytest.mark.parametrize(
    ("stored", "letters", "shape", "index", "element", "read"),
    [
        # heads 1 and 2 of a split by rows: rows 2 to 6 and no others
        (Stored("", "(H K) D"), "DHK", (6, 4), ((0, 4), (1, 3), (0, 2)),
         lambda d, h, k: (2 * h + k) * 4 + d, [(2, 6), (0, 4)]),
        # part of the head dim: rows of the heads are read whole, then cut
        (Stored("", "(H K) D"), "DHK", (6, 4), ((1, 3), (0, 3), (1, 2)),
         lambda d, h, k: (2 * h + k) * 4 + d, [(0, 6), (1, 3)]),
        # one head, part of its dim: only that part
        (Stored("", "(H K) D"), "DHK", (6, 4), ((0, 4), (2, 3), (1, 2)),
         lambda d, h, k: (2 * h + k) * 4 + d, [(5, 6), (0, 4)]),
        # keys of GPT-2: the second third of the columns
        (Stored("", "D (3 H K)", 1), "DHK", (4, 18), ((0, 4), (0, 3), (0, 2)),
         lambda d, h, k: d * 18 + 6 + 2 * h + k, [(0, 4), (6, 12)]),
        # values of BLOOM, heads 1 and 2: from the first of head 1 to the last of head 2
        (Stored("", "(H 3 K) D", 2), "DHK", (18, 4), ((0, 4), (1, 3), (0, 2)),
         lambda d, h, k: (6 * h + 4 + k) * 4 + d, [(6, 18), (0, 4)]),
        (Stored("", "(H 3 K)", 0), "HK", (18,), ((2, 3), (0, 2)),
         lambda h, k: 6 * h + k, [(12, 14)]),
        (Stored("", "V D"), "DV", (5, 4), ((0, 2), (1, 4)),
         lambda d, v: v * 4 + d, [(1, 4), (0, 2)]),
    ],
)  # fmt: skip
def test_slices_in_another_order(stored, letters, shape, index, element, read):
    source = Recorder(np.arange(np.prod(shape)).reshape(shape))
    assert stored.shape(SIZES) == shape
    found = stored.take(source, letters, dict(zip(letters, index, strict=True)), SIZES)
    lengths = tuple(stop - start for start, stop in index)
    expected = np.fromfunction(
        lambda *at: element(
            *(i + start for i, (start, _) in zip(at, index, strict=True))
        ),
        lengths,
    )
    np.testing.assert_array_equal(found, expected)
    assert source.reads == [read]


def test_beyond_the_vocabulary_is_zero():
    table = np.arange(20.0).reshape(5, 4) + 1
    stored = Stored("", "V D")
    last = stored.take(table, "VD", {"V": (4, 8), "D": (0, 4)}, SIZES)
    np.testing.assert_array_equal(last, np.vstack([table[4:], np.zeros((3, 4))]))
    none = stored.take(table, "VD", {"V": (8, 12), "D": (0, 2)}, SIZES)
    np.testing.assert_array_equal(none, np.zeros((4, 2)))


def test_put_is_the_reverse_of_take():
    parts = [np.random.default_rng(i).normal(size=(4, 3, 2)) for i in range(3)]
    for dims in ("D (3 H K)", "(H 3 K) D"):
        stored = [Stored("", dims, part) for part in range(3)]
        fused = np.zeros(stored[0].shape(SIZES))
        for each, part in zip(stored, parts, strict=True):
            each.put(fused, "DHK", part, SIZES)
        whole = {"D": (0, 4), "H": (0, 3), "K": (0, 2)}
        for each, part in zip(stored, parts, strict=True):
            np.testing.assert_array_equal(each.take(fused, "DHK", whole, SIZES), part)
