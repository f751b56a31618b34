"""Optimizers against updates computed by hand in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxspeed import spec
from jaxspeed.optim import OneCycle, Optimizer, Schedule, build, learning_rate
from jaxspeed.optim.matrices import is_matrix

CONSTANT = Schedule(kind="constant")
NAMES = ["adam", "adamw", "adagrad", "lamb", "lion", "sgd", "muon", "adafactor"]


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax multiplies integers by floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def params_and_gradients(steps=3, seed=0):
    random = np.random.default_rng(seed)

    def tree():
        return {
            "weight": random.normal(size=(4, 3)).astype(np.float32),
            "scale": random.normal(size=(4,)).astype(np.float32),
        }

    return tree(), [tree() for _ in range(steps)]


def run(optimizer, params, gradients, leaves=None, total=10):
    """The params after one update per gradient."""
    transform = build(optimizer, total, leaves=leaves)
    update = jax.jit(transform.update)
    params = jax.tree.map(jnp.asarray, params)
    state = transform.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def adam_directions(gradients, first, second, epsilon):
    """Bias-corrected Adam directions, one per gradient."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m = first * m + (1 - first) * g
        v = second * v + (1 - second) * g**2
        yield m / (1 - first**t) / (np.sqrt(v / (1 - second**t)) + epsilon)


def test_adamw_decays_matrices_only():
    params, gradients = params_and_gradients()
    optimizer = Optimizer(learning_rate=0.1, clip_norm=None, schedule=CONSTANT)
    after = run(optimizer, params, gradients)
    for name, decay in (("weight", 0.1), ("scale", 0.0)):
        expected = params[name]
        grads = [gradient[name] for gradient in gradients]
        for direction in adam_directions(grads, 0.9, 0.95, 1e-8):
            expected = expected - 0.1 * (direction + decay * expected)
        np.testing.assert_allclose(after[name], expected, rtol=2e-5)


def test_bias_correction_can_be_left_out():
    params, gradients = params_and_gradients(steps=2)
    optimizer = Optimizer(
        learning_rate=0.1,
        weight_decay=0.0,
        clip_norm=None,
        bias_correction=False,
        schedule=CONSTANT,
    )
    after = run(optimizer, params, gradients)
    first, second = (gradient["scale"] for gradient in gradients)
    m, v = 0.1 * first, 0.05 * first**2
    expected = params["scale"] - 0.1 * m / np.sqrt(v)
    m, v = 0.9 * m + 0.1 * second, 0.95 * v + 0.05 * second**2
    expected = expected - 0.1 * m / np.sqrt(v)
    np.testing.assert_allclose(after["scale"], expected, rtol=1e-5)


def test_adam_adds_decay_to_the_gradient():
    params, gradients = params_and_gradients(steps=1)
    optimizer = Optimizer(
        name="adam",
        learning_rate=0.1,
        weight_decay=0.5,
        decay="all",
        clip_norm=None,
        schedule=CONSTANT,
    )
    after = run(optimizer, params, gradients)
    for name, before in params.items():
        sign = np.sign(gradients[0][name] + 0.5 * before)
        np.testing.assert_allclose(after[name], before - 0.1 * sign, rtol=1e-4)


def test_sgd_with_momentum():
    params, gradients = params_and_gradients(steps=2)
    optimizer = Optimizer(
        name="sgd",
        learning_rate=0.1,
        momentum=0.5,
        weight_decay=0.0,
        clip_norm=None,
        schedule=CONSTANT,
    )
    after = run(optimizer, params, gradients)
    first, second = (gradient["weight"] for gradient in gradients)
    expected = params["weight"] - 0.1 * first - 0.1 * (0.5 * first + second)
    np.testing.assert_allclose(after["weight"], expected, rtol=1e-5)


def test_adagrad_divides_by_the_root_of_summed_squares():
    params, gradients = params_and_gradients(steps=2)
    optimizer = Optimizer(
        name="adagrad",
        learning_rate=0.1,
        weight_decay=0.0,
        clip_norm=None,
        epsilon=1e-10,
        schedule=CONSTANT,
    )
    after = run(optimizer, params, gradients)
    first, second = (gradient["scale"] for gradient in gradients)
    expected = params["scale"] - 0.1 * first / np.abs(first)
    expected = expected - 0.1 * second / np.sqrt(first**2 + second**2)
    np.testing.assert_allclose(after["scale"], expected, rtol=1e-5)


def test_adagrad_does_not_divide_by_zero():
    optimizer = Optimizer(name="adagrad", learning_rate=0.1, schedule=CONSTANT)
    after = run(optimizer, {"w": np.zeros(2)}, [{"w": np.zeros(2)}])
    assert after["w"].tolist() == [0, 0]


def test_lion_moves_by_the_sign():
    params, gradients = params_and_gradients(steps=1)
    optimizer = Optimizer(
        name="lion", learning_rate=0.1, clip_norm=None, schedule=CONSTANT
    )
    after = run(optimizer, params, gradients)
    before, sign = params["weight"], np.sign(gradients[0]["weight"])
    np.testing.assert_allclose(
        after["weight"], before - 0.1 * (sign + 0.1 * before), rtol=1e-5
    )


@pytest.mark.parametrize("bounds", [(0.01, 10.0), (0.5, 0.5)])
def test_lamb_takes_its_trust_ratio_per_layer(bounds):
    """A stacked leaf is updated like its layers one by one."""
    random = np.random.default_rng(1)
    params = {"weight": random.normal(size=(2, 4, 3)).astype(np.float32)}
    params["weight"][1] *= 5
    gradients = [{"weight": random.normal(size=(2, 4, 3)).astype(np.float32)}]
    leaves = spec.leaves(params, {"weight": ("layers", "model", "feed_forward")})
    optimizer = Optimizer(
        name="lamb",
        learning_rate=0.1,
        clip_norm=None,
        trust_ratio=bounds,
        schedule=CONSTANT,
    )
    after = run(optimizer, params, gradients, leaves)["weight"]
    for layer in range(2):
        before, gradient = params["weight"][layer], gradients[0]["weight"][layer]
        update = np.sign(gradient) + 0.1 * before
        ratio = np.linalg.norm(before) / np.linalg.norm(update)
        expected = before - 0.1 * np.clip(ratio, *bounds) * update
        np.testing.assert_allclose(after[layer], expected, rtol=1e-4)


def test_lamb_moves_a_zero_weight_at_the_plain_rate():
    params, gradients = {"w": np.zeros((2, 2))}, [{"w": np.ones((2, 2))}]
    optimizer = Optimizer(
        name="lamb", learning_rate=0.1, clip_norm=None, schedule=CONSTANT
    )
    after = run(optimizer, params, gradients)
    np.testing.assert_allclose(after["w"], np.full((2, 2), -0.1), rtol=1e-5)


MUON_DIMS = {
    "query": ("layers", "model", "heads", "head"),
    "out": ("layers", "heads", "head", "model"),
    "bias": ("layers", "heads", "head"),
    "table": ("vocabulary", "model"),
    "scale": ("layers", "model"),
}


@pytest.mark.parametrize("adam_rate", [None, 0.003])
def test_muon_orthogonalizes_each_layers_matrix(adam_rate):
    random = np.random.default_rng(2)
    shapes = dict(
        query=(2, 8, 2, 2),
        out=(2, 2, 2, 8),
        bias=(2, 2, 2),
        table=(6, 8),
        scale=(2, 8),
    )
    params = {k: np.zeros(shape, np.float32) for k, shape in shapes.items()}
    gradient = {
        k: random.normal(size=shape).astype(np.float32) for k, shape in shapes.items()
    }
    optimizer = Optimizer(
        name="muon",
        learning_rate=0.1,
        clip_norm=None,
        adam_learning_rate=adam_rate,
        schedule=CONSTANT,
    )
    after = run(optimizer, params, [gradient], spec.leaves(params, MUON_DIMS))
    for name, rows in (("query", 8), ("out", 4)):
        columns = 32 // rows
        own = 0.2 * 8**0.5 if adam_rate is None else max(1, columns / rows) ** 0.5
        for layer in range(2):
            matrix = after[name][layer].reshape(rows, columns) / (-0.1 * own)
            singular = np.linalg.svd(matrix, compute_uv=False)
            assert np.all((0.6 < singular) & (singular < 1.3)), singular
            left, _, right = np.linalg.svd(
                gradient[name][layer].reshape(rows, columns), full_matrices=False
            )
            assert np.sum(matrix * (left @ right)) / 4 > 0.6
    for name in ("bias", "table", "scale"):
        rate = 0.1 if adam_rate is None else adam_rate
        expected = -rate * np.sign(gradient[name])
        np.testing.assert_allclose(after[name], expected, rtol=1e-4)


def test_clips_by_the_global_norm():
    params, gradients = params_and_gradients(steps=1)
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients[0].values()))
    optimizer = Optimizer(
        name="sgd",
        learning_rate=1.0,
        momentum=0.0,
        weight_decay=0.0,
        clip_norm=0.5,
        schedule=CONSTANT,
    )
    after = run(optimizer, params, gradients)
    for name, before in params.items():
        expected = before - gradients[0][name] * 0.5 / norm
        np.testing.assert_allclose(after[name], expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends_on_a_quadratic(name):
    target, _ = params_and_gradients(seed=3)
    params = jax.tree.map(jnp.ones_like, target)
    transform = build(
        Optimizer(name=name, learning_rate=0.02, weight_decay=0.0), total_steps=30
    )

    def loss(params):
        gaps = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
        return sum(jax.tree.leaves(gaps))

    @jax.jit
    def step(params, state):
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    first = loss(params)
    for _ in range(30):
        params, state = step(params, state)
    assert loss(params) < 0.9 * first


def test_schedule_sets_the_rate_of_each_update():
    params, gradients = {"w": np.zeros(1)}, [{"w": np.ones(1)}] * 4
    schedule = Schedule(kind="warmup_linear", warmup_steps=2, floor=0.0)
    optimizer = Optimizer(
        name="sgd",
        learning_rate=0.4,
        momentum=0.0,
        weight_decay=0.0,
        clip_norm=None,
        schedule=schedule,
    )
    after = run(optimizer, params, gradients, total=4)
    np.testing.assert_allclose(after["w"], [-(0 + 0.2 + 0.4 + 0.2)], rtol=1e-6)
    rate = learning_rate(optimizer, 4)
    np.testing.assert_allclose([rate(t) for t in range(5)], [0, 0.2, 0.4, 0.2, 0])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_one_cycle_moves_the_momentum(name):
    """Low momentum first, then high: DeepSpeed's first update is at the minimum."""
    cycle = OneCycle(first_steps=1000, min_momentum=0.2, max_momentum=0.6)
    schedule = Schedule(kind="OneCycle", start=1.0, one_cycle=cycle)
    optimizer = Optimizer(
        name=name,
        learning_rate=1.0,
        weight_decay=0.0,
        clip_norm=None,
        betas=(0.9, 0.0),
        schedule=schedule,
    )
    params, gradients = {"w": np.zeros(1)}, [{"w": np.ones(1)}, {"w": -np.ones(1)}]
    high = 0.6 - 0.4 / 1000
    if name == "sgd":
        expected = -1 - (high * 1 - 1)
    else:
        m = high * (1 - 0.2) - (1 - high)
        expected = -1 - m / (1 - high**2)
    after = run(optimizer, params, gradients)
    np.testing.assert_allclose(after["w"], [expected], rtol=1e-4)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ((None, None), True),
        ((None,), False),
        (("layers", "model"), False),
        (("layers", "model", "feed_forward"), True),
        (("heads", "head"), False),
        (("experts", "feed_forward"), False),
        (("vocabulary", "model"), True),
    ],
)
def test_what_counts_as_a_matrix(dims, expected):
    assert is_matrix(spec.Leaf("leaf", (2,) * len(dims), dims)) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="adamax"), "optimizer.name is 'adamax'; it must be one of adam"),
        (dict(decay="none"), "optimizer.decay is 'none'.*matrices, all"),
        (dict(betas=(0.9, 1.0)), r"optimizer.betas is \(0.9, 1.0\)"),
        (dict(learning_rate=0.0), "optimizer.learning_rate is 0.0.*positive"),
        (dict(momentum=1.0), "optimizer.momentum is 1.0"),
        (dict(clip_norm=0.0), "optimizer.clip_norm is 0.0.*None not to clip"),
        (dict(weight_decay=-0.1), "optimizer.weight_decay is -0.1"),
        (dict(trust_ratio=(2.0, 1.0)), r"optimizer.trust_ratio is \(2.0, 1.0\)"),
        (
            dict(name="adagrad", schedule=Schedule(kind="OneCycle")),
            "OneCycle moves the momentum, which adagrad.*cycle_momentum to False",
        ),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**arguments)
