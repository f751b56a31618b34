"""Schedules against hand-computed values and a plain-Python DeepSpeed scheduler."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.optim import (
    OneCycle,
    RangeTest,
    Schedule,
    build_schedule,
    momentum_schedule,
)

PEAK = 0.4


def rates(schedule, count, total=1000, peak=PEAK):
    """The learning rates of the first `count` updates, with a traced step."""
    function = build_schedule(schedule, peak, total)
    return np.asarray(jax.jit(jax.vmap(function))(jnp.arange(count)))


def stepped(first, formula, count):
    """A scheduler stepped after each update: `first`, then the formula from batch 0."""
    return np.array([first] + [formula(batch) for batch in range(count - 1)])


def test_constant_warms_up_then_stays():
    schedule = Schedule(kind="constant", warmup_steps=4, start=0.5)
    expected = [0.2, 0.25, 0.3, 0.35, 0.4, 0.4, 0.4]
    np.testing.assert_allclose(rates(schedule, 7), expected, rtol=1e-6)


def test_warmup_linear_falls_to_the_floor():
    schedule = Schedule(kind="warmup_linear", warmup_steps=2, floor=0.25)
    expected = [0, 0.2, 0.4, 0.325, 0.25, 0.175, 0.1, 0.1]
    np.testing.assert_allclose(rates(schedule, 8, total=6), expected, rtol=1e-6)


def test_warmup_cosine_passes_its_middle_half_way():
    schedule = Schedule(kind="warmup_cosine", warmup_steps=2, floor=0.5)
    expected = [0, 0.2, 0.4, 0.3 + 0.1 * math.sqrt(0.5), 0.3]
    expected += [0.3 - 0.1 * math.sqrt(0.5), 0.2, 0.2]
    np.testing.assert_allclose(rates(schedule, 8, total=6), expected, rtol=1e-6)


def test_total_steps_of_the_schedule_overrides_the_run():
    short = Schedule(kind="warmup_linear", floor=0.0, total_steps=4)
    np.testing.assert_allclose(rates(short, 5), [0.4, 0.3, 0.2, 0.1, 0], atol=1e-7)


@pytest.mark.parametrize("staircase", [False, True])
def test_range_test(staircase):
    schedule = Schedule(
        kind="LRRangeTest",
        range_test=RangeTest(step_size=3, step_rate=2.0, staircase=staircase),
    )
    batch = np.arange(9) // 3 if staircase else np.arange(9) / 3
    expected = PEAK * (1 + 2.0 * batch)
    np.testing.assert_allclose(rates(schedule, 9), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", ["log", "linear"])
@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_warmup_lr(shape, warmup):
    low, n = 0.1, max(2, warmup)

    def formula(batch):
        if batch >= n:
            return PEAK
        gamma = math.log(batch + 1) / math.log(n) if shape == "log" else batch / n
        return low + (PEAK - low) * gamma

    schedule = Schedule(
        kind="WarmupLR", warmup_steps=warmup, warmup_shape=shape, start=low / PEAK
    )
    expected = stepped(low, formula, 12)
    np.testing.assert_allclose(rates(schedule, 12), expected, rtol=1e-6)


def test_warmup_lr_by_hand():
    schedule = Schedule(kind="WarmupLR", warmup_steps=4)
    expected = [0, 0, 0.2, 0.4 * math.log(3) / math.log(4), 0.4, 0.4]
    np.testing.assert_allclose(rates(schedule, 6), expected, rtol=1e-6)


@pytest.mark.parametrize("total", [3, 5, 10])
def test_warmup_decay_lr(total):
    low, n = 0.04, 5

    def formula(batch):
        if batch < n:
            gamma = batch / n
        else:
            gamma = max(0.0, (total - batch) / max(1.0, total - n))
        return low + (PEAK - low) * gamma

    schedule = Schedule(
        kind="WarmupDecayLR",
        warmup_steps=n,
        warmup_shape="linear",
        start=low / PEAK,
        total_steps=total,
    )
    expected = stepped(low, formula, 15)
    np.testing.assert_allclose(rates(schedule, 15), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("total", [3, 12])
@pytest.mark.parametrize("shape", ["log", "linear"])
def test_warmup_cosine_lr(total, shape):
    low, floor, n = 0.2, 0.05, 4

    def formula(batch):
        if batch < n:
            gamma = math.log(batch + 1) / math.log(n) if shape == "log" else batch / n
            return PEAK * (low + (1 - low) * gamma)
        progress = min(1.0, (batch - n + 1) / max(1, total - n))
        return PEAK * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)

    schedule = Schedule(
        kind="WarmupCosineLR",
        warmup_steps=n,
        warmup_shape=shape,
        start=low,
        floor=floor,
    )
    expected = stepped(0.0, formula, 16)  # update 0 is 0, whatever the start is
    np.testing.assert_allclose(rates(schedule, 16, total), expected, rtol=1e-6)


def cycle_height(cycle, update):
    """DeepSpeed's scale factor, in exact rational steps."""
    first = cycle.first_steps
    second = first if cycle.second_steps is None else cycle.second_steps
    second_stairs = (
        cycle.first_stairs if cycle.second_stairs is None else cycle.second_stairs
    )
    at = update % (first + second)
    rising = at <= first
    numerator, steps = (at, first) if rising else (first + second - at, second)
    stairs = cycle.first_stairs if rising else second_stairs
    if stairs:
        return math.floor(numerator * stairs / steps) / stairs
    return numerator / steps


CYCLES = [
    OneCycle(first_steps=4),
    OneCycle(first_steps=4, second_steps=2, decay_steps=3, decay_rate=0.5),
    OneCycle(first_steps=6, second_steps=9, first_stairs=3, second_stairs=0),
    OneCycle(
        first_steps=6,
        second_steps=3,
        first_stairs=2,
        decay_steps=2,
        decay_rate=1.0,
        momentum_decay_rate=0.1,
    ),
    OneCycle(first_steps=3, second_steps=0, decay_steps=1, decay_rate=2.0),
]


@pytest.mark.parametrize("cycle", CYCLES)
def test_one_cycle(cycle):
    low, length, count = 0.1, cycle.total_steps, 30
    rate, momentum = [], []
    for update in range(count):
        if update <= length:
            height = cycle_height(cycle, update)
            rate.append(low + (PEAK - low) * height)
            span = cycle.max_momentum - cycle.min_momentum
            momentum.append(cycle.max_momentum - span * height)
        else:
            interval = (update - length) / cycle.decay_steps if cycle.decay_steps else 0
            rate.append(low / (1 + cycle.decay_rate * interval))
            growth = 1 + cycle.momentum_decay_rate * interval
            momentum.append(cycle.max_momentum * growth)
    momentum[0] = cycle.min_momentum
    schedule = Schedule(kind="OneCycle", start=low / PEAK, one_cycle=cycle)
    np.testing.assert_allclose(rates(schedule, count), rate, rtol=1e-6)
    moving = jax.vmap(momentum_schedule(schedule))(jnp.arange(count))
    np.testing.assert_allclose(moving, momentum, rtol=1e-6)


def test_one_cycle_by_hand():
    cycle = OneCycle(first_steps=2, second_steps=4, decay_steps=2, decay_rate=1.0)
    schedule = Schedule(kind="OneCycle", start=0.5, one_cycle=cycle)
    expected = [0.2, 0.3, 0.4, 0.35, 0.3, 0.25, 0.2, 0.2 / 1.5, 0.1, 0.08]
    np.testing.assert_allclose(rates(schedule, 10), expected, rtol=1e-6)


@pytest.mark.parametrize("count", [1000, 3000])
def test_staircase_reaches_its_top(count):
    """A float quotient would floor just below 1 for some lengths of the cycle."""
    cycle = OneCycle(first_steps=count, second_steps=7 * count // 3, first_stairs=10)
    schedule = Schedule(kind="OneCycle", one_cycle=cycle)
    assert build_schedule(schedule, 1.0, 1)(count) == 1.0


def test_momentum_moves_only_in_one_cycle():
    assert momentum_schedule(Schedule()) is None
    still = OneCycle(cycle_momentum=False)
    assert momentum_schedule(Schedule(kind="OneCycle", one_cycle=still)) is None


@pytest.mark.parametrize("kind", ["constant", "LRRangeTest", "OneCycle", "WarmupLR"])
def test_rates_are_float32(kind):
    rate = build_schedule(Schedule(kind=kind, warmup_steps=3), 1e-3, 10)(2)
    assert rate.dtype == jnp.float32 and rate.shape == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="cosine"), "schedule.kind is 'cosine'; it must be one of constant"),
        (dict(warmup_shape="cubic"), "warmup_shape is 'cubic'.*log, linear"),
        (dict(floor=1e-5 - 1), "schedule.floor is -0.99.*fraction"),
        (dict(kind="WarmupLR"), "warmup_steps is 0; WarmupLR needs 1 or more"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


def test_refuses_nonsensical_cycles():
    with pytest.raises(ValueError, match=r"one_cycle.first_steps is 0"):
        OneCycle(first_steps=0)
    with pytest.raises(ValueError, match=r"one_cycle.decay_steps is -1"):
        OneCycle(decay_steps=-1)
    with pytest.raises(ValueError, match=r"range_test.step_size is 0"):
        RangeTest(step_size=0)


def test_a_run_shorter_than_its_warmup_ends_in_it():
    rate = build_schedule(Schedule(warmup_steps=20), 1e-3, 10)
    assert float(rate(10)) == pytest.approx(0.5e-3)
