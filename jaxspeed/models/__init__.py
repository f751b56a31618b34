"""The decoder of many families, and its exchange with Hugging Face folders."""

from jaxspeed.models.hugging_face import from_pretrained as from_pretrained
from jaxspeed.models.hugging_face import load_params as load_params
from jaxspeed.models.hugging_face import read_config as read_config
from jaxspeed.models.hugging_face import save_pretrained as save_pretrained
from jaxspeed.models.layers import AttentionConfig as AttentionConfig
from jaxspeed.models.layers import FeedForwardConfig as FeedForwardConfig
from jaxspeed.models.layers import NormConfig as NormConfig
from jaxspeed.models.layers import PositionConfig as PositionConfig
from jaxspeed.models.parameters import to_decoder as to_decoder
from jaxspeed.models.quantized import quantize as quantize
from jaxspeed.models.quantized_file import load_quantized as load_quantized
from jaxspeed.models.quantized_file import save_quantized as save_quantized
from jaxspeed.models.sparse_attention import SparseConfig as SparseConfig
from jaxspeed.models.transformer import Cache as Cache
from jaxspeed.models.transformer import Decoder as Decoder
from jaxspeed.models.transformer import DecoderConfig as DecoderConfig
