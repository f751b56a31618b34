"""The run that `jaxspeed train` makes with no arguments.

A byte-level decoder of two and a half million parameters on the source and docstrings
of Python's own standard library. On simulated CPU devices it takes about two minutes on
two cores and shows every part at work; on accelerators the same run uses them all.
"""

import jax

from jaxspeed.checkpoint import Checkpoint
from jaxspeed.config import Batch, Config, Run
from jaxspeed.data import Data
from jaxspeed.mesh import MeshShape
from jaxspeed.models.layers import AttentionConfig, FeedForwardConfig
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.optim import Optimizer, Schedule
from jaxspeed.parallel.zero import Zero


def default_config() -> Config:
    """The default run for the devices that JAX sees: ZeRO-3, and `tensor` of 2.

    An odd number of devices is all data parallel.
    """
    devices = jax.device_count()
    tensor = 2 if devices % 2 == 0 else 1
    shards = devices // tensor
    return Config(
        model=DecoderConfig(
            dim=256,
            num_layers=4,
            attention=AttentionConfig(heads=8, kv_heads=2, head_dim=32),
            feed_forward=FeedForwardConfig(hidden_dim=512),
        ),
        mesh=MeshShape(data=shards, tensor=tensor),
        zero=Zero(stage=3),
        batch=Batch(size=-(-8 // shards) * shards),
        data=Data(sequence_length=128),
        optimizer=Optimizer(
            learning_rate=2e-3,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            schedule=Schedule(kind="warmup_cosine", warmup_steps=20, floor=0.05),
        ),
        checkpoint=Checkpoint(every=100),
        run=Run(steps=500, evaluate_batches=32),
        remat="none",
    )
