"""The engine: every kind of model, any optax optimizer, precision, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxspeed as js
from tests.parallel import contract

ROWS, WIDTH = 16, 24


def samples(seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(ROWS, WIDTH)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1, keepdims=True)).astype(np.float32)}


def network(key):
    keys = jax.random.split(key)
    return {
        "first": jax.random.normal(keys[0], (WIDTH, 40)) / WIDTH**0.5,
        "bias": jnp.zeros((40,)),
        "last": jax.random.normal(keys[1], (40, 1)) / 40**0.5,
    }


def squared_error(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["first"] + params["bias"])
    return jnp.mean((hidden @ params["last"] - batch["y"]) ** 2)


def train(engine, steps=5):
    state = engine.init(jax.random.key(0))
    losses = []
    for seed in range(steps):
        state, metrics = engine.step(state, samples(seed))
        losses.append(float(metrics["loss"]))
    return state, losses


def engine_for(stage, axes, optimizer, **config):
    return js.initialize(
        js.Config(zero=js.Zero(stage=stage, min_size=1), **config),
        squared_error,
        optimizer,
        params=network,
        mesh=contract.mesh_of(axes),
    )


OPTIMIZERS = {
    "clipped": optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0)),
    "per_leaf_clip": optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(1.0)),
    "lamb": optax.lamb(1e-2),
    "lars": optax.lars(1e-1),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "masked_decay": optax.adamw(
        1e-2, weight_decay=0.5, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "muon": optax.contrib.muon(1e-2),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 2),
    "two_rates": optax.multi_transform(
        {"fast": optax.sgd(0.1), "slow": optax.adam(1e-3)},
        {"first": "fast", "bias": "slow", "last": "fast"},
    ),
    "scheduled": optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 0.0, 5)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optax_optimizer_is_right_on_shards(name):
    whole, _ = train(engine_for(0, {}, OPTIMIZERS[name]))
    for stage in (1, 3):
        shards, _ = train(engine_for(stage, dict(data=8), OPTIMIZERS[name]))
        for a, b in zip(
            jax.tree.leaves(shards.params), jax.tree.leaves(whole.params), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_user_optimizer_equals_plain_optax():
    """The engine against a loop written by hand with whole arrays."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(1e-2))
    state, losses = train(engine_for(3, dict(data=4, replica=2), optimizer))
    params = network(jax.random.split(jax.random.key(0))[0])
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(params)
        for seed, loss in enumerate(losses):
            mine, gradients = jax.value_and_grad(squared_error)(
                params, samples(seed), None
            )
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            params = optax.apply_updates(params, updates)
            assert loss == pytest.approx(float(mine), rel=1e-5)
    np.testing.assert_allclose(state.params["first"], params["first"], atol=1e-6)


class Module(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, 40, rngs=rngs)
        self.last = nnx.Linear(40, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def module_loss(model, batch, key):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


@pytest.mark.parametrize("make", [Module, Module(nnx.Rngs(3))], ids=["made", "given"])
def test_nnx_modules(make):
    losses = {}
    for stage, axes in ((0, {}), (3, dict(data=4))):
        engine = js.initialize(
            js.Config(zero=js.Zero(stage=stage, min_size=1)),
            make,
            optax.adam(1e-2),
            loss=module_loss,
            mesh=contract.mesh_of(axes),
        )
        losses[stage] = train(engine)[1]
    np.testing.assert_allclose(losses[3], losses[0], rtol=1e-5)
    assert len(set(losses[0])) == len(losses[0])


def test_an_nnx_instance_starts_from_its_own_values():
    module = Module(nnx.Rngs(3))
    engine = js.initialize(js.Config(), module, optax.sgd(0.1), loss=module_loss)
    state = engine.init(jax.random.key(9))
    np.testing.assert_array_equal(
        state.params["first"]["kernel"], module.first.kernel[...]
    )


def test_dropout_differs_by_step_and_device_and_repeats_by_key():
    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.weight = nnx.Param(jnp.ones((512,)))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(x * self.weight[...])

    engine = js.initialize(
        js.Config(),
        Dropped,
        optax.sgd(0.0),
        loss=lambda model, batch, key: jnp.mean(model(batch)),
        mesh=contract.mesh_of(dict(data=8)),
    )
    batch = np.ones((8, 512), np.float32)
    runs = []
    for _ in range(2):
        state = engine.init(jax.random.key(0))
        losses = []
        for _ in range(3):
            state, metrics = engine.step(state, batch)
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3
    # Were the masks of the 8 rows equal, the mean would be a multiple of 2/512.
    assert any(abs(loss * 256 - round(loss * 256)) > 1e-3 for loss in runs[0])


def test_linen_modules():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(jnp.tanh(linen.Dense(40)(x)))

    losses = {}
    for stage, axes in ((0, {}), (3, dict(data=8))):
        program = js.train.from_linen(
            Linen(),
            lambda apply, batch, key: jnp.mean((apply(batch["x"]) - batch["y"]) ** 2),
            (jax.ShapeDtypeStruct((1, WIDTH), jnp.float32),),
        )
        engine = js.initialize(
            js.Config(zero=js.Zero(stage=stage, min_size=1)),
            program,
            optax.adam(1e-2),
            mesh=contract.mesh_of(axes),
        )
        losses[stage] = train(engine)[1]
    np.testing.assert_allclose(losses[3], losses[0], rtol=1e-5)


def test_a_loss_that_ignores_tensor_is_right_on_a_mesh_that_has_it():
    expected = train(engine_for(0, {}, optax.adam(1e-2)))[1]
    engine = engine_for(3, dict(data=2, tensor=4), optax.adam(1e-2))
    np.testing.assert_allclose(train(engine)[1], expected, rtol=1e-5)


def test_metrics_and_unequal_weights():
    """`js.Loss` weighs shards and micro-batches as one batch would be weighed."""

    def loss(params, batch, key):
        error = (batch["x"] @ params["w"] - batch["y"]) ** 2
        weight = batch["weight"][:, None]
        total, count = jnp.sum(error * weight), jnp.sum(weight)
        mean = jnp.sum(jnp.abs(error) * weight) / jnp.maximum(count, 1)
        return js.Loss(total, count, {"absolute": mean})

    batch = samples() | {"weight": (np.arange(ROWS) < 5).astype(np.float32)}
    results = []
    for axes, accumulation in (({}, 1), (dict(data=4), 2), (dict(data=8), 1)):
        engine = js.initialize(
            js.Config(batch=js.Batch(ROWS, accumulation)),
            loss,
            optax.sgd(0.1),
            params={"w": jnp.ones((WIDTH, 1))},
            mesh=contract.mesh_of(axes),
        )
        state, metrics = engine.step(engine.init(jax.random.key(0)), batch)
        results.append(
            [
                float(metrics["loss"]),
                float(metrics["absolute"]),
                *np.asarray(state.params["w"]).ravel().tolist(),
            ]
        )
    error = (batch["x"][:5] @ np.ones((WIDTH, 1)) - batch["y"][:5]) ** 2
    assert results[0][0] == pytest.approx(error.mean(), rel=1e-5)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5)


def test_parameters_are_created_in_shards():
    engine = js.initialize(
        js.Config(zero=js.Zero(stage=3, min_size=1)),
        lambda params, batch, key: jnp.mean(params["w"]) * jnp.mean(batch),
        optax.adam(1e-3),
        params=lambda key: {"w": jax.random.normal(key, (1024, 512))},
        mesh=contract.mesh_of(dict(data=8)),
    )
    create = jax.jit(engine.init)  # the same program, inspected
    state = engine.init(jax.random.key(0))
    assert state.params["w"].addressable_shards[0].data.shape == (128, 512)
    memory = create.lower(jax.random.key(0)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1024 * 512 * 4
    same = engine.init(jax.random.key(0)).params["w"]
    np.testing.assert_array_equal(same, state.params["w"])


def test_the_same_key_gives_the_same_parameters_on_any_mesh():
    one = engine_for(0, {}, optax.sgd(0.1)).init(jax.random.key(4)).params
    many = engine_for(3, dict(data=4, tensor=2), optax.sgd(0.1))
    for a, b in zip(
        jax.tree.leaves(one),
        jax.tree.leaves(many.init(jax.random.key(4)).params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_half_precision_follows_float32(stage, compute):
    precision = js.Precision(compute=compute)
    axes = dict(data=2, tensor=2)
    engine = contract.engine_of(axes, stage, precision=precision)
    result = contract.run(engine)
    expected = contract.one_device()
    np.testing.assert_allclose(result.losses, expected.losses, rtol=1e-2)
    assert all(w.dtype == np.float32 for w in jax.tree.leaves(result.weights))
    state = jax.eval_shape(engine.init, jax.random.key(0))
    half = jax.tree.leaves(state.params)[0].dtype == jnp.dtype(compute)
    assert half == (stage in (1, 2))
    assert (state.master is not None) == (stage in (1, 2))


def overflow_engine(**scale):
    """Gradients overflow float16 exactly where the batch is large."""
    return js.initialize(
        js.Config(
            precision=js.Precision(compute="float16", loss_scale=js.LossScale(**scale))
        ),
        lambda p, batch, key: jnp.mean(
            p["w"] * jnp.asarray(batch["x"], p["w"].dtype)
        ).astype(jnp.float32),
        optax.adam(1e-2),
        params={"w": jnp.ones((8,))},
        mesh=contract.mesh_of(dict(data=2)),
    )


def test_steps_that_overflow_are_skipped_and_counted():
    engine = overflow_engine(initial_power=8, hysteresis=1, window=100)
    state = engine.init(jax.random.key(0))
    good, bad = np.full((4, 8), 0.01, np.float32), np.full((4, 8), 6e4, np.float32)
    history = []
    for x in (good, bad, bad, good):
        before = jax.tree.map(np.asarray, (state.params, state.opt_state))
        state, metrics = engine.step(state, {"x": x})
        after = jax.tree.map(np.asarray, (state.params, state.opt_state))
        same = all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(before), jax.tree.leaves(after), strict=True
            )
        )
        assert same == (x is bad)
        history.append((float(metrics["loss_scale"]), int(metrics["skipped"])))
    assert history == [(256, 0), (256, 1), (128, 2), (64, 2)]
    assert int(state.step) == 4


def test_a_nan_in_float32_is_skipped_too():
    engine = engine_for(3, dict(data=4), optax.adam(1e-2))
    state = engine.init(jax.random.key(0))
    before = np.asarray(state.params["first"])
    batch = samples()
    batch["x"][3, 3] = np.nan
    state, metrics = engine.step(state, batch)
    np.testing.assert_array_equal(state.params["first"], before)
    assert int(metrics["skipped"]) == 1
    state, metrics = engine.step(state, samples())
    assert np.isfinite(float(metrics["loss"]))
    assert not np.array_equal(np.asarray(state.params["first"]), before)


def test_evaluate_is_the_loss_without_a_step():
    engine = contract.engine_of(dict(data=2, tensor=2), 3)
    state = engine.init(jax.random.key(1))
    batch = next(contract.batches())
    loss = engine.evaluate(state, batch)
    assert float(loss.weight) == batch["weights"].sum()
    _, metrics = engine.step(state, batch)
    assert float(loss.total / loss.weight) == pytest.approx(
        float(metrics["loss"]), rel=1e-6
    )


def test_the_step_donates_its_state_and_compiles_once():
    engine = engine_for(3, dict(data=8), optax.adam(1e-2))
    state = engine.init(jax.random.key(0))
    old = state.params["first"]
    with jax.log_compiles(False):
        state, _ = engine.step(state, samples())
        assert old.is_deleted()
        with jax.transfer_guard_device_to_host("disallow"):
            for seed in range(3):
                state, metrics = engine.step(state, samples(seed))
    assert set(metrics) == {"loss", "grad_norm", "skipped"}


def test_checkpoints_load_on_any_mesh_stage_and_precision(tmp_path):
    place = js.Checkpoint(directory=str(tmp_path))
    first = contract.engine_of(dict(data=4, tensor=2), 3, checkpoint=place)
    state = first.init(jax.random.key(1))
    batches = list(contract.batches())
    for batch in batches[:2]:
        state, _ = first.step(state, batch)
    first.save(state, {"note": [1, 2]})
    first.wait()
    expected = [float(first.step(state, batches[2])[1]["loss"])]
    for axes, stage, compute in (
        ({}, 0, "float32"),
        (dict(replica=2, data=2), 2, "float32"),
        (dict(data=8), 1, "bfloat16"),
    ):
        engine = contract.engine_of(
            axes, stage, checkpoint=place, precision=js.Precision(compute=compute)
        )
        state, notes = engine.restore()
        assert notes == {"note": [1, 2]} and int(state.step) == 2
        loss = float(engine.step(state, batches[2])[1]["loss"])
        tolerance = 1e-6 if compute == "float32" else 1e-2
        assert loss == pytest.approx(expected[0], rel=tolerance)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"batch\['x'\] has 12 rows.*multiple of 8"):
        engine = engine_for(0, dict(data=8), optax.sgd(0.1))
        batch = jax.tree.map(lambda x: x[:12], samples())
        engine.step(engine.init(jax.random.key(0)), batch)
    with pytest.raises(ValueError, match=r"seq=2.*not built yet"):
        engine_for(0, dict(seq=2), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"has 0 rows"):
        engine.step(
            engine.init(jax.random.key(0)), jax.tree.map(lambda x: x[:0], samples())
        )
    with pytest.raises(TypeError, match=r"needs its parameters as well \(params="):
        js.initialize(js.Config(), squared_error, optax.sgd(0.1))
    with pytest.raises(TypeError, match="loss=lambda model, batch, key"):
        js.initialize(js.Config(), Module, optax.sgd(0.1))
    with pytest.raises(TypeError, match="from_linen"):
        js.initialize(js.Config(), linen.Dense(3), optax.sgd(0.1))
    with pytest.raises(TypeError, match="parameter 'n' has dtype int32"):
        js.initialize(
            js.Config(), squared_error, optax.sgd(0.1), params={"n": jnp.arange(3)}
        )
    with pytest.raises(ValueError, match=r"checkpoint=dict\(directory="):
        engine = engine_for(0, {}, optax.sgd(0.1))
        engine.save(engine.init(jax.random.key(0)))
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        place = js.Checkpoint(directory=str(tmp_path))
        engine_for(0, {}, optax.sgd(0.1), checkpoint=place).restore()
    model = dataclasses.replace(
        contract.MODEL,
        attention=dataclasses.replace(contract.MODEL.attention, heads=6, kv_heads=6),
    )
    divides = r"tensor=4 does not divide dim 'heads'.*one of \[1, 2, 3, 6\]"
    with pytest.raises(ValueError, match=divides):
        js.initialize(
            js.Config(),
            lambda rngs: js.models.Decoder(model, rngs=rngs),
            optax.sgd(0.1),
            mesh=contract.mesh_of(dict(tensor=4)),
        )
    with pytest.raises(TypeError, match="must return a scalar"):
        engine = js.initialize(
            js.Config(),
            lambda p, batch, key: p["w"],
            optax.sgd(0.1),
            params={"w": jnp.ones(3)},
        )
        engine.step(engine.init(jax.random.key(0)), np.ones((8, 1), np.float32))


def test_a_loss_that_averages_itself_has_the_right_gradient():
    engine = engine_for(3, dict(data=8), optax.sgd(0.1))
    expected = engine.step(engine.init(jax.random.key(0)), samples())[1]

    def averaged(params, batch, key):
        return jax.lax.pmean(squared_error(params, batch, key), "data")

    engine = js.initialize(
        js.Config(zero=js.Zero(stage=3, min_size=1)),
        averaged,
        optax.sgd(0.1),
        params=network,
    )
    metrics = engine.step(engine.init(jax.random.key(0)), samples())[1]
    for name in ("loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)


def test_tied_parameters_are_one():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
            self.last = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
            self.last.kernel = self.first.kernel

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    engine = js.initialize(
        js.Config(zero=js.Zero(stage=3, min_size=1)),
        Tied,
        optax.sgd(1.0),
        loss=lambda model, batch, key: jnp.mean(model(batch["x"]) ** 2),
    )
    state = engine.init(jax.random.key(0))
    before = jax.tree.map(np.asarray, state.params)
    assert len(jax.tree.leaves(before)) == 1
    kernel = before["first"]["kernel"]
    gradient = jax.grad(lambda w: jnp.mean((jnp.tanh(samples()["x"] @ w) @ w) ** 2))(
        kernel
    )
    state, _ = engine.step(state, samples())
    np.testing.assert_allclose(
        state.params["first"]["kernel"], kernel - gradient, atol=1e-5
    )


def test_evaluation_has_no_dropout():
    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.weight = nnx.Param(jnp.ones((64,)))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(x * self.weight[...])

    engine = js.initialize(
        js.Config(),
        Dropped,
        optax.sgd(0.0),
        loss=lambda model, batch, key: jnp.mean(model(batch)),
    )
    state = engine.init(jax.random.key(0))
    loss = engine.evaluate(state, np.ones((8, 64), np.float32))
    assert float(loss.total / loss.weight) == 1.0


def test_a_batch_without_weight_is_skipped():
    engine = contract.engine_of(dict(data=2), 1)
    state = engine.init(jax.random.key(1))
    before = np.asarray(state.params["head"]["projection"])
    batch = next(contract.batches())
    batch["weights"] = np.zeros_like(batch["weights"])
    state, metrics = engine.step(state, batch)
    assert int(metrics["skipped"]) == 1
    np.testing.assert_array_equal(state.params["head"]["projection"], before)


def test_more_errors_say_what_to_do(tmp_path):
    engine = engine_for(0, dict(data=2), optax.sgd(0.1))
    state = engine.init(jax.random.key(0))
    engine.step(state, samples())
    with pytest.raises(ValueError, match=r"buffers were reused by engine.step"):
        engine.step(state, samples())
    wrong = {**network(jax.random.key(0)), "bias": jnp.zeros((41,))}
    with pytest.raises(ValueError, match=r"'bias': the model has shape \(40,\)"):
        engine.init(jax.random.key(0), wrong)
    with pytest.raises(TypeError, match=r"give a js.Config"):
        js.initialize({"zero": 1}, squared_error, params=network)
    with pytest.raises(ValueError, match=r"make it with js.make_mesh"):
        js.initialize(
            js.Config(),
            squared_error,
            params=network,
            mesh=jax.make_mesh((8,), ("data",)),
        )

    class Frozen(Module):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.scale = nnx.Variable(jnp.ones(3))

    with pytest.raises(ValueError, match="neither parameters nor random streams"):
        js.initialize(js.Config(), Frozen, optax.sgd(0.1), loss=module_loss)
    place = js.Checkpoint(directory=str(tmp_path))
    engine = engine_for(0, {}, optax.sgd(0.1), checkpoint=place)
    state = engine.init(jax.random.key(0))
    engine.save(state)
    engine.wait()
    with pytest.raises(FileExistsError, match="holds checkpoints of steps"):
        engine.save(state)
