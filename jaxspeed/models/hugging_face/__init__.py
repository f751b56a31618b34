"""Hugging Face folders <-> decoders: Llama, Mistral, Qwen2, Qwen3, GPT-2 and BLOOM."""

from jaxspeed.models.hugging_face.load import from_pretrained as from_pretrained
from jaxspeed.models.hugging_face.load import load_params as load_params
from jaxspeed.models.hugging_face.load import read_config as read_config
from jaxspeed.models.hugging_face.save import save_pretrained as save_pretrained
