"""ZeRO's table counted from compiled programs: bytes sent and bytes held per stage."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxspeed import plan, train
from jaxspeed.config import Config
from jaxspeed.mesh import MeshShape, make_mesh
from jaxspeed.models.layers import AttentionConfig, FeedForwardConfig
from jaxspeed.models.transformer import Decoder, DecoderConfig
from jaxspeed.parallel.zero import Placement, Zero

MODEL = DecoderConfig(
    dim=128,
    num_layers=4,
    attention=AttentionConfig(heads=8, kv_heads=8, head_dim=16),
    feed_forward=FeedForwardConfig(hidden_dim=352),
)
WIDTH = 4
"""Bytes of a float32, the dtype of everything here: CPU programs send bfloat16 as
float32, which would hide half of each saving."""


def run() -> list[dict[str, Any]]:
    """One row per stage and mesh: counted against the paper's formula."""
    devices = len(jax.devices())
    if devices % 4:
        raise ValueError(f"bench zero needs a multiple of 4 devices, not {devices}")
    shapes = {"data": dict(data=devices)}
    shapes["replica x data"] = dict(replica=2, data=devices // 2)
    return [
        measure(stage, name, sizes)
        for name, sizes in shapes.items()
        for stage in (0, 1, 2, 3)
    ]


def measure(stage: int, name: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Compiles one step and counts what a device sends and holds."""
    engine = train.initialize(
        Config(zero=Zero(stage=stage)),
        lambda rngs: Decoder(MODEL, rngs=rngs),
        optax.adam(1e-3),
        mesh=make_mesh(MeshShape(**sizes)),
    )
    tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32)
    compiled = engine.lower({"tokens": tokens, "targets": tokens}).compile()
    found = plan.collectives(compiled, engine.mesh)
    sent, expected = sum(c.bytes_sent for c in found), formula(engine, stage)
    state = engine.init(jax.random.key(0))
    held, held_expected = _held(state), held_formula(engine, stage)
    return {
        "mesh": name,
        "stage": stage,
        "collectives": _counts(found),
        "bytes_sent": sent,
        "formula_bytes_sent": round(expected),
        "sent_ratio": sent / expected,
        "paper_bytes_sent": round(paper(engine, stage)),
        "state_bytes": held,
        "formula_state_bytes": round(held_expected),
        "state_ratio": held / held_expected,
        "temp_bytes": plan.program_memory(compiled)["temp_bytes"],
    }


def formula(engine: train.Engine, stage: int) -> float:
    """Bytes that one device sends in a step, from the sizes of the leaves alone.

    Over n devices an all-gather or reduce-scatter of b bytes sends b (n-1)/n and an
    all-reduce twice that (Rajbhandari et al., 2020, section 7). Hybrid sharding adds an
    all-reduce of the shards over `replica`. Stage 3 gathers a weight a second time
    where the backward pass reads it and the forward pass has freed it: in the layers
    but the last, not in the head (both used last) and not in the embedding (its
    backward pass reads no weight).
    """
    sizes = engine.mesh.shape
    replicas, shards = sizes["replica"], sizes["data"]
    total = 0.0
    for leaf, place in _leaves(engine):
        size, everyone = WIDTH * math.prod(leaf.shape), replicas * shards
        if place.stage == 0:
            total += 2 * size * (everyone - 1) / everyone
            continue
        once = size * (shards - 1) / shards
        depth = leaf.shape[0] if len(leaf.shape) > 2 else 1
        gathers = 2 - 1 / depth if stage == 3 else 1
        total += once * (1 + gathers)
        total += 2 * size / shards * (replicas - 1) / replicas
    return total


def paper(engine: train.Engine, stage: int) -> float:
    """The paper's upper figure: 2Ψ, at stage 3 3Ψ, and the all-reduce over replicas."""
    sizes = engine.mesh.shape
    replicas, shards = sizes["replica"], sizes["data"]
    size = WIDTH * sum(math.prod(leaf.shape) for leaf, _ in _leaves(engine))
    if stage == 0:
        everyone = replicas * shards
        return 2 * size * (everyone - 1) / everyone
    passes = 3 if stage == 3 else 2
    over_replicas = 2 * size / shards * (replicas - 1) / replicas
    return passes * size * (shards - 1) / shards + over_replicas


def held_formula(engine: train.Engine, stage: int) -> float:
    """Bytes of weights and Adam's two moments on one device: 4Ψ + 8Ψ, split by row."""
    total = 0.0
    for leaf, place in _leaves(engine):
        size = WIDTH * math.prod(leaf.shape)
        shards = engine.mesh.shape["data"] if place.stage else 1
        total += size / (shards if stage == 3 else 1) + 2 * size / shards
    return total


def _leaves(engine: train.Engine) -> list[tuple[Any, Placement]]:
    state = jax.eval_shape(engine.init, jax.random.key(0))
    places = jax.tree.leaves(
        engine.layout.placements, is_leaf=lambda x: isinstance(x, Placement)
    )
    return list(zip(jax.tree.leaves(state.params), places, strict=True))


def _held(state: train.TrainState) -> int:
    trees = (state.params, state.master, state.opt_state)
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(trees))


def _counts(found: list[plan.Collective]) -> str:
    rows = plan.summarise(found)
    parts = [f"{r['count']} {r['op']} over {'+'.join(r['axes'])}" for r in rows]
    return ", ".join(parts)
