"""Qwen2 and Qwen3 files (Yang et al., 2024; 2025): Llama's layout with windows.

Qwen2 has biases on queries, keys and values; Qwen3 has norms on queries and keys.
"""

from jaxspeed.models.hugging_face.family import Family, Json, read
from jaxspeed.models.hugging_face.llama import (
    PREFIX,
    TENSORS,
    read_gated,
    read_heads,
    read_window,
    write_gated,
)
from jaxspeed.models.transformer import DecoderConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def _read_windows(raw: Json) -> Json:
    """The window and the layers that have it, as arguments of `AttentionConfig`."""
    layers = read(raw, "num_hidden_layers", int)
    used = read(raw, "use_sliding_window", bool, False)
    window = read_window(raw) if used else None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = read(raw, "max_window_layers", int, 28, least=0) if window else layers
        kinds = [FULL if i < first else SLIDING for i in range(layers)]
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in (FULL, SLIDING) for kind in kinds)
    ):
        raise ValueError(
            f"layer_types is {kinds!r}; it must be {FULL!r} or {SLIDING!r} for each of "
            f"the {layers} layers"
        )
    if SLIDING in kinds and window is None:
        raise ValueError(
            f"layer_types has {SLIDING!r}, which needs use_sliding_window true (it is "
            f"{used}) and a sliding_window (it is {raw.get('sliding_window')!r})"
        )
    windowed = tuple(i for i, kind in enumerate(kinds) if kind == SLIDING)
    return {"window": window, "window_layers": windowed} if windowed else {}


def _write_windows(config: DecoderConfig) -> Json:
    layers = range(config.num_layers)
    window, windowed = config.attention.window, config.attention.window_layers
    if window is None:
        windowed = ()
    elif windowed is None:
        windowed = tuple(layers)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": min(windowed, default=config.num_layers),
        "layer_types": [SLIDING if i in windowed else FULL for i in layers],
    }


def _read_qwen2(raw: Json) -> DecoderConfig:
    heads = read_heads(raw, kv_heads=32)
    return read_gated(raw, **heads, **_read_windows(raw), qkv_bias=True)


def _write_qwen2(config: DecoderConfig) -> Json:
    return write_gated(config) | _write_windows(config)


def _read_qwen3(raw: Json) -> DecoderConfig:
    attention = read_heads(raw, kv_heads=32, head_dim=128) | _read_windows(raw)
    bias = read(raw, "attention_bias", bool, False)
    return read_gated(raw, **attention, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _write_qwen3(config: DecoderConfig) -> Json:
    bias = {"attention_bias": config.attention.qkv_bias}
    return write_gated(config) | _write_windows(config) | bias


QWEN2 = Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen2, PREFIX, TENSORS)
QWEN3 = Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen3, PREFIX, TENSORS)
