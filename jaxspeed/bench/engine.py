"""What the engine costs over a hand-written jitted optax step of the same model."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array

import jaxspeed.train as train
from jaxspeed.config import Config
from jaxspeed.mesh import make_mesh
from jaxspeed.models.layers import AttentionConfig, FeedForwardConfig
from jaxspeed.models.transformer import Decoder, DecoderConfig
from jaxspeed.parallel.zero import Zero

MODEL = DecoderConfig(
    dim=256,
    num_layers=4,
    attention=AttentionConfig(heads=4, kv_heads=4, head_dim=64),
    feed_forward=FeedForwardConfig(hidden_dim=704),
)
ROWS, LENGTH, ROUNDS = 8, 256, 25


def run() -> list[dict[str, Any]]:
    """Step times of both on one device, interleaved: medians and the median ratio."""
    random = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    tokens = random.integers(0, MODEL.vocab_size, shape).astype(np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1)}
    steps = {"hand-written": _hand_written(batch)}
    for stage in (0, 3):
        steps[f"engine, stage {stage}"] = _engine(batch, stage)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS):
        # Each round starts with another one, so that drift favours none.
        order = list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(steps[name]())
            times[name].append(time.perf_counter() - start)
    base = times["hand-written"]
    return [
        {
            "step": name,
            "median_seconds": statistics.median(seconds),
            "median_ratio": statistics.median(
                mine / other for mine, other in zip(seconds, base, strict=True)
            ),
            "rounds": ROUNDS,
        }
        for name, seconds in times.items()
    ]


def _program() -> train.Program:
    return train.from_nnx(lambda rngs: Decoder(MODEL, rngs=rngs, remat_policy="none"))


def _hand_written(batch: Any) -> Callable[[], Array]:
    """The step a JAX user would write: value_and_grad, optax, donated buffers."""
    program, optimizer = _program(), optax.adamw(1e-3)
    device = jax.devices()[0]

    def mean_loss(params: Any, batch: Any) -> Array:
        loss = program.loss(params, batch, jax.random.key(0))
        return loss.total / loss.weight

    def update(params: Any, opt_state: Any, batch: Any):
        loss, gradients = jax.value_and_grad(mean_loss)(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))
    params = jax.jit(program.init, device=device)(jax.random.key(0))
    carry = [params, jax.jit(optimizer.init)(params)]
    placed = jax.device_put(batch, device)

    def step() -> Array:
        carry[0], carry[1], loss = compiled(carry[0], carry[1], placed)
        return loss

    jax.block_until_ready(step())
    return step


def _engine(batch: Any, stage: int) -> Callable[[], Array]:
    engine = train.initialize(
        Config(zero=Zero(stage=stage)),
        _program(),
        optax.adamw(1e-3),
        mesh=make_mesh(devices=jax.devices()[:1]),
    )
    carry = [engine.init(jax.random.key(0))]

    def step() -> Array:
        carry[0], metrics = engine.step(carry[0], batch)
        return metrics["loss"]

    jax.block_until_ready(step())
    return step
