"""ZeRO and tensor parallelism: every stage on every mesh equals one device."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxspeed.models import AttentionConfig, Decoder
from jaxspeed.train import from_nnx
from tests.parallel import contract


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", contract.MESHES)
def test_equals_one_device(name, stage):
    engine = contract.engine_of(contract.MESHES[name], stage)
    contract.compare(contract.run(engine), contract.one_device())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_micro_batches_equal_one_batch(stage):
    axes = dict(data=2, tensor=2)
    engine = contract.engine_of(axes, stage, accumulation=4)
    contract.compare(contract.run(engine), contract.one_device())


def test_the_compiler_partitioned_model_gives_the_same_loss():
    """The same model under jit alone, with weights in shards and no shard_map."""
    engine = contract.engine_of(dict(data=2, tensor=2), 3)
    state = engine.init(jax.random.key(1))
    batch = next(contract.batches())
    expected = float(engine.step(state, batch)[1]["loss"])
    state = engine.init(jax.random.key(1))
    program = from_nnx(lambda rngs: Decoder(contract.MODEL, rngs=rngs))
    loss = jax.jit(program.loss)(state.params, batch, jax.random.key(0))
    np.testing.assert_allclose(float(loss.total / loss.weight), expected, rtol=2e-6)


@pytest.mark.parametrize("kv_heads, size", [(1, 2), (3, 2), (3, 4), (2, 4)])
def test_key_and_value_heads_that_tensor_does_not_divide(kv_heads, size):
    """One head for each group of devices, or one for each query head."""
    heads = 12 if kv_heads == 3 else 8
    model = dataclasses.replace(
        contract.MODEL,
        num_layers=1,
        attention=AttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=6),
    )
    results = []
    for axes in ({}, dict(tensor=size)):
        engine = contract.engine_of(axes, 0, model=model)
        results.append(contract.run(engine))
    contract.compare(results[1], results[0])


def test_sequences_that_tensor_does_not_divide():
    """15 tokens on 4 devices: activations stay whole and are all-reduced."""
    results = []
    for axes in ({}, dict(tensor=4), dict(data=2, tensor=2)):
        engine = contract.engine_of(axes, 3)
        results.append(contract.run(engine, length=15))
    contract.compare(results[1], results[0])
    contract.compare(results[2], results[0])
