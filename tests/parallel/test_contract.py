"""ZeRO and tensor parallelism: every stage on every mesh equals one device."""

import jax
import numpy as np
import pytest

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
    from jaxspeed.models import Decoder
    from jaxspeed.train import from_nnx

    program = from_nnx(lambda rngs: Decoder(contract.MODEL, rngs=rngs))
    loss = jax.jit(program.loss)(state.params, batch, jax.random.key(0))
    np.testing.assert_allclose(float(loss.total / loss.weight), expected, rtol=2e-6)
