"""The loss scale's trajectory against DeepSpeed's rules, retold in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.optim import LossScale, Precision, loss_scale


def trajectory(config, finite):
    """The scale before each step and after the last."""
    step = jax.jit(loss_scale.update, static_argnums=0)
    state = loss_scale.init(config)
    scales = [float(state.scale)]
    for good in finite:
        state = step(config, state, jnp.asarray(good))
        scales.append(float(state.scale))
    return scales


def retold(config, finite):
    """The same, from iteration counters and the iteration of the last overflow."""
    scale, hysteresis = 2.0**config.initial_power, config.hysteresis
    last_overflow, scales = -1, [2.0**config.initial_power]
    for iteration, good in enumerate(finite):
        if not good:
            if hysteresis == 1:
                scale = max(scale / 2, config.minimum)
            else:
                hysteresis -= 1
            last_overflow = iteration
        else:
            if config.consecutive_hysteresis:
                hysteresis = config.hysteresis
            stable = iteration - last_overflow - 1
            if stable > 0 and stable % config.window == 0:
                hysteresis = config.hysteresis
                scale *= 2
        scales.append(scale)
    return scales


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_follows_deepspeed(hysteresis, consecutive, window):
    config = LossScale(
        initial_power=6,
        window=window,
        hysteresis=hysteresis,
        minimum=2.0,
        consecutive_hysteresis=consecutive,
    )
    random = np.random.default_rng(window)
    for overflow_rate in (0.1, 0.5, 0.9):
        finite = random.random(60) > overflow_rate
        assert trajectory(config, finite) == retold(config, finite)


def test_first_overflow_is_forgiven_and_the_next_halves():
    config = LossScale(initial_power=8)
    assert trajectory(config, [False] * 4) == [256, 256, 128, 64, 32]


def test_growth_needs_a_window_of_good_steps_before():
    config = LossScale(initial_power=3, window=2, hysteresis=1)
    good = [True] * 5 + [False] + [True] * 3
    assert trajectory(config, good) == [8, 8, 8, 16, 16, 32, 16, 16, 16, 32]


def test_spent_hysteresis_returns_with_growth_or_at_once():
    bad_good_bad = [False, True, False]
    config = LossScale(initial_power=4)
    assert trajectory(config, bad_good_bad) == [16, 16, 16, 8]
    config = LossScale(initial_power=4, consecutive_hysteresis=True)
    assert trajectory(config, bad_good_bad) == [16, 16, 16, 16]


def test_stops_at_the_minimum():
    config = LossScale(initial_power=2, hysteresis=1, minimum=2.0)
    assert trajectory(config, [False] * 3) == [4, 2, 2, 2]


def test_static_scale_never_moves():
    config = LossScale(static=128.0, window=1, hysteresis=1)
    assert trajectory(config, [True, True, False, True]) == [128] * 5


def test_defaults_are_deepspeeds():
    state = loss_scale.init(LossScale())
    assert float(state.scale) == 65536.0
    assert int(state.hysteresis) == 2
    assert LossScale().window == 1000 and LossScale().minimum == 1.0


def test_state_is_three_scalars_that_scan_can_carry():
    config = LossScale(initial_power=5, window=1, hysteresis=1)

    def step(state, finite):
        state = loss_scale.update(config, state, finite)
        return state, state.scale

    finite = jnp.array([True, True, False])
    state, scales = jax.lax.scan(step, loss_scale.init(config), finite)
    assert scales.tolist() == [32, 64, 32]
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert dtypes == [jnp.float32, jnp.int32, jnp.int32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(static=0.0), "loss_scale.static is 0.0; give a positive scale, or None"),
        (dict(window=0), "loss_scale.window is 0"),
        (dict(hysteresis=0), "loss_scale.hysteresis is 0"),
        (dict(initial_power=128), "loss_scale.initial_power is 128"),
        (dict(minimum=0.0), "loss_scale.minimum is 0.0"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossScale(**arguments)


def test_precision_names_its_dtype():
    assert Precision(compute="bfloat16").dtype == jnp.bfloat16
    assert Precision(compute="float16").scales_loss
    assert not Precision().scales_loss
    with pytest.raises(ValueError, match=r"precision.compute is 'fp16'.*float16"):
        Precision(compute="fp16")
