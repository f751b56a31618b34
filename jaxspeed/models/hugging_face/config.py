"""`config.json` of a Hugging Face folder <-> `DecoderConfig`.

What the decoder does not compute is refused by key and value. Which family can hold a
configuration needs no rules: it is the one whose config.json, read back, gives the
same configuration.
"""

import dataclasses
from typing import Any

from jaxspeed.models import layers as L
from jaxspeed.models.hugging_face.bloom import BLOOM
from jaxspeed.models.hugging_face.family import Family, Json, refuse_other
from jaxspeed.models.hugging_face.gpt2 import GPT2
from jaxspeed.models.hugging_face.llama import LLAMA, MISTRAL
from jaxspeed.models.hugging_face.qwen import QWEN2, QWEN3
from jaxspeed.models.sparse_attention import SparseConfig
from jaxspeed.models.transformer import DecoderConfig

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gpt2": GPT2,
    "bloom": BLOOM,
}
"""By `model_type`, in the order in which they are tried for writing."""

ONLY: Json = {
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "num_experts": None,
    "num_local_experts": None,
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "apply_residual_connection_post_layernorm": False,
}
"""Keys that change what a model computes, and the one value that is supported."""


def from_json(raw: Json) -> DecoderConfig:
    """The configuration that a config.json describes.

    Raises:
        ValueError: unknown family, a missing or malformed key, an unsupported feature.
    """
    family = family_of(raw)
    raw = {family.aliases.get(key, key): value for key, value in raw.items()}
    for key, supported in ONLY.items():
        refuse_other(key, raw.get(key), supported)
    return family.read(raw)


def family_of(raw: Json) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: `model_type` is absent or unknown; lists those that can be read.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"model_type is {name!r} (architectures: {raw.get('architectures')}); the "
            f"families that can be read are {sorted(FAMILIES)}"
        )
    return FAMILIES[name]


def to_json(config: DecoderConfig) -> Json:
    """The config.json of the first family that holds `config`.

    Raises:
        ValueError: no family holds it; says what the nearest one would need.
    """
    config = _effective(config)
    misfits: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        raw = family.write(config)
        try:
            misfits[name] = _differences(config, _effective(family.read(raw)))
        except ValueError as error:
            misfits[name] = [str(error)]
        if not misfits[name]:
            return {
                "architectures": [family.architecture],
                "model_type": name,
                **raw,
                "bos_token_id": None,
                "eos_token_id": None,
            }
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    raise ValueError(
        f"none of the families {sorted(FAMILIES)} can hold this model; the nearest is "
        f"{nearest}, which needs {', '.join(misfits[nearest])}"
    )


def _effective(config: DecoderConfig) -> DecoderConfig:
    """`config` with every field that changes nothing at one fixed value."""
    position, attention = config.position, config.attention
    used = ["kind", "max_length"]
    if position.kind == "rope":
        used += ["theta", "scaling"]
        if position.scaling != "none":
            used += ["factor"]
        if position.scaling == "llama3":
            used += ["low_frequency", "high_frequency", "original_length"]
    window, windowed = attention.window, attention.window_layers
    if windowed is not None:
        windowed = tuple(i for i in range(config.num_layers) if i in windowed)
    if window is None or windowed == ():
        window, windowed = None, None
    elif windowed == tuple(range(config.num_layers)):
        windowed = None
    return dataclasses.replace(
        config,
        vocab_multiple=1,
        position=L.PositionConfig(
            **{field: getattr(position, field) for field in used}
        ),
        attention=dataclasses.replace(
            attention,
            window=window,
            window_layers=windowed,
            sparse=SparseConfig()
            if attention.sparse.layers == ()
            else attention.sparse,
        ),
    )


def _differences(wanted: Any, offered: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for field in dataclasses.fields(wanted):
        ours, theirs = getattr(wanted, field.name), getattr(offered, field.name)
        if dataclasses.is_dataclass(ours):
            found += _differences(ours, theirs, f"{prefix}{field.name}.")
        elif ours != theirs:
            found.append(f"{prefix}{field.name}={theirs!r} (it is {ours!r})")
    return found
