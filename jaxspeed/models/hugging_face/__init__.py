"""Hugging Face folders <-> decoders: Llama, Mistral, Qwen2, Qwen3, GPT-2 and BLOOM."""

from jaxspeed.models.hugging_face.load import (
    from_pretrained,
    load_params,
    read_config,
)
from jaxspeed.models.hugging_face.save import save_pretrained

__all__ = ["from_pretrained", "load_params", "read_config", "save_pretrained"]
