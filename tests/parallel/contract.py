"""The contract of every strategy: what one device computes, any mesh computes.

A case is a mesh, a ZeRO row and a number of micro-batches. Every case trains the same
model on the same batches from the same key as one device with stage 0 does.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax

import jaxspeed as js
from jaxspeed.models import AttentionConfig, Decoder, DecoderConfig, FeedForwardConfig

STEPS = 5
# Float32 sums in another order: relative to the largest gradient of the leaf, and to
# the weights' own size after five steps.
LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 5e-5
WEIGHT_TOLERANCE = 2e-5

MODEL = DecoderConfig(
    vocab_size=101,
    dim=36,
    num_layers=2,
    attention=AttentionConfig(heads=8, kv_heads=2, head_dim=6),
    feed_forward=FeedForwardConfig(hidden_dim=88),
    vocab_multiple=8,
)
"""Few sizes are powers of two: ZeRO over 8 must look for a dim that divides."""

# A large epsilon keeps Adam from blowing up rounding where gradients are tiny.
OPTIMIZER = optax.adamw(1e-2, b1=0.9, eps=1e-3, weight_decay=0.1)

MESHES = {
    "one": {},
    "data8": dict(data=8),
    "data2_tensor2_replica2": dict(data=2, tensor=2, replica=2),
    "tensor8": dict(tensor=8),
    "data2_expert2_tensor2": dict(data=2, expert=2, tensor=2),
    "replica2_data4": dict(replica=2, data=4),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a case leaves: per-step figures, first gradients, last weights."""

    losses: np.ndarray
    norms: np.ndarray
    gradients: dict
    weights: dict


def batches(rows: int = 16, length: int = 16):
    """Random tokens, with documents, padding and unequal numbers of valid targets."""
    random = np.random.default_rng(0)
    shape = (rows, length)
    for _ in range(STEPS):
        tokens = random.integers(0, MODEL.vocab_size, shape).astype(np.int32)
        ends = random.integers(4, length, rows)
        place = np.arange(length)
        second = place[None] >= ends[:, None]
        yield {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=1),
            "segments": (1 + second).astype(np.int32),
            "positions": np.where(second, place - ends[:, None], place).astype(
                np.int32
            ),
            "weights": (random.random(shape) > 0.4).astype(np.float32)
            * (np.arange(rows) % 3 > 0)[:, None],
        }


def mesh_of(axes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh on as many of the simulated devices as its axes need."""
    devices = jax.devices()[: math.prod(axes.values())]
    return js.make_mesh(js.MeshShape(**{"data": 1, **axes}), devices=devices)


def engine_of(
    axes: dict[str, int], stage: int, accumulation: int = 1, *, model=MODEL, **config
):
    """The contract's engine on a mesh."""
    return js.initialize(
        js.Config(
            zero=js.Zero(stage=stage, min_size=64),
            batch=js.Batch(size=16, accumulation=accumulation),
            **config,
        ),
        lambda rngs: Decoder(model, rngs=rngs),
        OPTIMIZER,
        mesh=mesh_of(axes),
    )


def run(engine: js.Engine, length: int = 16) -> Result:
    """Five steps; Adam's first moment after one step is a tenth of the gradient."""
    state = engine.init(jax.random.key(1))
    losses, norms, gradients = [], [], {}
    for batch in batches(length=length):
        state, metrics = engine.step(state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if not gradients:
            moments = state.opt_state[0].mu
            gradients = jax.tree.map(lambda m: 10 * np.asarray(m), moments)
    weights = jax.tree.map(np.asarray, engine.params(state))
    return Result(np.asarray(losses), np.asarray(norms), gradients, weights)


@functools.cache
def one_device() -> Result:
    """What every case must equal."""
    return run(engine_of({}, 0))


def compare(result: Result, expected: Result) -> None:
    """Asserts that a case computed what one device did."""
    np.testing.assert_allclose(result.losses, expected.losses, rtol=LOSS_TOLERANCE)
    np.testing.assert_allclose(result.norms, expected.norms, rtol=GRADIENT_TOLERANCE)
    for name, tolerance in (
        ("gradients", GRADIENT_TOLERANCE),
        ("weights", WEIGHT_TOLERANCE),
    ):
        got, want = getattr(result, name), getattr(expected, name)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
        ):
            scale = np.abs(b).max()
            np.testing.assert_allclose(
                a / scale,
                b / scale,
                atol=tolerance,
                rtol=0,
                err_msg=f"{name} of {jax.tree_util.keystr(path)}",
            )
