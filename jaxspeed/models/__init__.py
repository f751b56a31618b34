"""The decoder of many families, and its exchange with Hugging Face folders."""

from jaxspeed.models.hugging_face import (
    from_pretrained,
    load_params,
    read_config,
    save_pretrained,
)
from jaxspeed.models.layers import (
    AttentionConfig,
    FeedForwardConfig,
    NormConfig,
    PositionConfig,
)
from jaxspeed.models.transformer import Cache, Decoder, DecoderConfig

__all__ = [
    "AttentionConfig",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "FeedForwardConfig",
    "NormConfig",
    "PositionConfig",
    "from_pretrained",
    "load_params",
    "read_config",
    "save_pretrained",
]
