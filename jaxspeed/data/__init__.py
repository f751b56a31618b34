"""Text to packed batches: sources, tokenizers, packing and the loader (grain)."""

from jaxspeed.data.corpus import Data as Data
from jaxspeed.data.loader import Batches as Batches
from jaxspeed.data.loader import held_out_batches as held_out_batches
from jaxspeed.data.loader import host_rows as host_rows
from jaxspeed.data.loader import train_batches as train_batches
from jaxspeed.data.packing import Batch as Batch
from jaxspeed.data.tokenizer import BareIds as BareIds
from jaxspeed.data.tokenizer import ByteTokenizer as ByteTokenizer
from jaxspeed.data.tokenizer import HuggingFaceTokenizer as HuggingFaceTokenizer
from jaxspeed.data.tokenizer import TextStream as TextStream
from jaxspeed.data.tokenizer import Tokenizer as Tokenizer
from jaxspeed.data.tokenizer import load_tokenizer as load_tokenizer
