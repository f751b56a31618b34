"""A small decoder on Python's own source, byte by byte, with ZeRO-3.

    jaxspeed train --config=configs/tiny.py --workdir=runs/tiny

Runs on whatever devices there are; on eight simulated ones it takes a minute or two on
two cores. The loss falls from 5.7 to about 2.1 nats per byte, on held-out text too.
"""

from ml_collections import ConfigDict

from jaxspeed.config import Config, thaw


def get_config() -> ConfigDict:
    """What differs from the defaults."""
    config = thaw(Config())
    config.model.dim = 128
    config.model.num_layers = 4
    config.model.attention.heads = 4
    config.model.attention.kv_heads = 2
    config.model.feed_forward.hidden_dim = 384
    config.zero.stage = 3
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule.warmup_steps = 20
    config.batch.size = 16
    config.data.sequence_length = 128
    return config
