"""Llama 3.1 70B with ZeRO-3 on all devices: sequences of 8192 tokens, one per device.

    jaxspeed plan --config=configs/llama3_70b.py --topology=v6e:16x16

shows what each device holds and sends, on a machine without accelerators. `train` takes
the same file (and a tokenizer: --config.data.tokenizer=FILE); `--from=FOLDER` starts
from a Hugging Face folder.
"""

from ml_collections import ConfigDict

from jaxspeed.config import Config, thaw


def get_config() -> ConfigDict:
    """What differs from the defaults."""
    config = thaw(Config())
    config.model.vocab_size = 128256
    config.model.dim = 8192
    config.model.num_layers = 80
    config.model.attention.heads = 64
    config.model.attention.kv_heads = 8
    config.model.attention.head_dim = 128
    config.model.feed_forward.hidden_dim = 28672
    config.model.position.max_length = 131072
    config.model.position.theta = 500000.0
    config.model.position.scaling = "llama3"
    config.model.position.factor = 8.0
    config.zero.stage = 3
    # Norms stay whole: splitting them costs a message each and saves nothing.
    config.zero.min_size = 100_000
    config.precision.compute = "bfloat16"
    config.remat = "full"
    config.batch.per_device = 1
    config.data.sequence_length = 8192
    config.optimizer.learning_rate = 1.5e-4
    config.optimizer.schedule.warmup_steps = 100
    return config
