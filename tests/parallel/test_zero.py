"""ZeRO's own promises: the table, counted; what is split, and on which dim."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxspeed as js
from jaxspeed import plan
from jaxspeed.bench import zero as bench
from jaxspeed.parallel import zero
from jaxspeed.spec import Leaf

SIZES = dict(pipe=1, replica=1, data=4, expert=1, seq=2, tensor=2)


WHOLE = P()


def split(shape, spec=WHOLE, *, dims=None, min_size=1, **sizes):
    leaf = Leaf("leaf", shape, dims or (None,) * len(shape))
    config = js.Zero(stage=3, min_size=min_size)
    return zero.rule(config, {**SIZES, **sizes})(leaf, spec)


def test_splits_the_dim_that_takes_all_axes():
    assert split((3, 16)) == P(None, ("data", "seq"))


def test_prefers_a_dim_that_no_other_axis_splits():
    assert split((64, 8), P("tensor")) == P("tensor", ("data", "seq"))


def test_splits_a_taken_dim_further_where_no_other_divides():
    assert split((16, 3), P("tensor")) == P(("tensor", "data", "seq"))


def test_takes_the_largest_subset_of_axes_that_divides():
    assert split((12, 3)) == P("data")
    assert split((6, 3)) == P("seq")


def test_leaves_whole_what_nothing_divides_or_is_small():
    assert split((7, 5)) == WHOLE
    assert split((8, 8), min_size=65) == WHOLE


def test_never_splits_the_dim_of_the_layer_scan():
    assert split((8, 3), dims=("layers", None)) == WHOLE
    # The threshold is per layer: 8 layers of 16 elements are small leaves.
    assert split((8, 16), dims=("layers", None), min_size=17) == WHOLE


def test_replicated_leaves_are_reported():
    params = {"odd": jnp.ones((7, 5)), "even": jnp.ones((8, 5))}
    engine = js.initialize(
        js.Config(zero=js.Zero(stage=1, min_size=1)),
        lambda p, batch, key: jnp.sum(p["odd"]) * jnp.mean(batch) + jnp.sum(p["even"]),
        optax.sgd(0.1),
        params=params,
    )
    assert engine.layout.replicated == ("odd",)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("stage", 4, "zero.stage is 4; it must be 0, 1, 2 or 3"),
        ("axes", ("dat",), "the mesh axes are"),
        ("reduce_dtype", "int8", "zero.reduce_dtype is 'int8'"),
    ],
)
def test_refuses_bad_options(field, value, message):
    with pytest.raises(ValueError, match=message):
        js.Zero(**{field: value})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [dict(data=8), dict(replica=2, data=4)])
def test_sends_and_holds_what_the_paper_says(stage, sizes):
    row = bench.measure(stage, "", sizes)
    assert row["sent_ratio"] == pytest.approx(1, abs=0.01)
    assert row["state_ratio"] == pytest.approx(1, abs=0.01)
    assert row["bytes_sent"] <= 1.0001 * row["paper_bytes_sent"]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [2, 3])
def test_whole_reduced_gradients_never_exist(stage, accumulation):
    """No all-reduce carries a split leaf, and accumulators are shards."""
    engine = js.initialize(
        js.Config(zero=js.Zero(stage=stage), batch=js.Batch(16, accumulation)),
        lambda rngs: js.models.Decoder(bench.MODEL, rngs=rngs),
        optax.adam(1e-3),
        mesh=js.make_mesh(data=8),
    )
    tokens = jax.ShapeDtypeStruct((32, 64), jnp.int32)
    compiled = engine.lower({"tokens": tokens, "targets": tokens}).compile()
    for found in plan.collectives(compiled, engine.mesh):
        if found.op == "all-reduce":
            # Norms and the loss are all that is summed whole.
            assert found.payload_bytes < 4 * bench.MODEL.dim * 16
    # A stacked gradient of the feed-forward, whole, would have this shape.
    model = bench.MODEL
    whole = f"f32[{model.num_layers},{model.dim},{model.feed_forward.hidden_dim}]"
    shard = (model.num_layers, model.dim // 8, model.feed_forward.hidden_dim)
    text = compiled.as_text()
    assert "f32[" + ",".join(map(str, shard)) + "]" in text
    produced = re.findall(rf"= {re.escape(whole)}\S* (.*)", text)
    # At stage 2 the parameters themselves are whole: given, gathered and laid out.
    given = ("parameter(", "get-tuple-element(", "copy(", "bitcast(", "all-gather(")
    other = [
        line
        for line in produced
        if not line.startswith(given) and "calls=%wrapped_copy" not in line
    ]
    assert not (other if stage == 2 else produced)


def test_stage_three_frees_gathered_layers():
    """Temporary memory does not hold the gathered weights of all layers."""
    row = {stage: bench.measure(stage, "", dict(data=8)) for stage in (0, 3)}
    weights = sum(
        4 * math.prod(leaf.shape)
        for leaf in jax.tree.leaves(
            jax.eval_shape(
                js.train.from_nnx(
                    lambda rngs: js.models.Decoder(bench.MODEL, rngs=rngs)
                ).init,
                jax.random.key(0),
            )
        )
    )
    # Stage 0 has whole gradients, stage 3 neither whole gradients nor weights.
    assert row[0]["temp_bytes"] - row[3]["temp_bytes"] > 0.9 * weights


def test_an_unscanned_loss_gathers_again_in_the_backward_pass():
    """A loss that knows nothing of ZeRO: weights are gathered twice, not kept."""
    width, depth = 64, 6
    params = {f"w{i}": jnp.eye(width) for i in range(depth)}

    def loss(params, batch, key):
        x = batch
        for i in range(depth):
            x = jnp.tanh(x @ params[f"w{i}"])
        return jnp.mean(x**2)

    engine = js.initialize(
        js.Config(zero=js.Zero(stage=3, min_size=1)),
        loss,
        optax.sgd(0.1),
        params=params,
        mesh=js.make_mesh(data=8),
    )
    # Counted before optimization: the CPU compiler drops the barrier that keeps the
    # second gather apart. `test_tpu.py` looks at a compiled TPU program.
    lowered = engine.lower(jax.ShapeDtypeStruct((8, width), jnp.float32)).as_text()
    # The first layer's backward pass reads the batch, not its weight.
    assert lowered.count('"stablehlo.all_gather"') == 2 * depth - 1
    assert lowered.count('"stablehlo.reduce_scatter"') == depth


def test_hand_written_layer_scan_with_gather():
    """A user's own scan: named dims and `js.gather`, any stage, same numbers."""
    layers, width = 3, 32
    params = {"w": 0.1 * jax.random.normal(jax.random.key(0), (layers, width, width))}

    def loss(params, batch, key):
        def block(x, layer):
            return jnp.tanh(x @ js.gather(layer)["w"]), None

        x, _ = jax.lax.scan(jax.checkpoint(block), batch, params)
        return jnp.mean(x**2)

    batch = np.random.default_rng(0).normal(size=(8, width)).astype(np.float32)
    expected = None
    for stage in (0, 1, 2, 3):
        program = js.train.from_function(
            loss, params, dims={"w": ("layers", None, None)}, gathers=True
        )
        engine = js.initialize(
            js.Config(zero=js.Zero(stage=stage, min_size=1)), program, optax.sgd(0.5)
        )
        state = engine.init(jax.random.key(0))
        for _ in range(3):
            state, _ = engine.step(state, batch)
        weights = np.asarray(state.params["w"])
        expected = weights if expected is None else expected
        np.testing.assert_allclose(weights, expected, atol=1e-6)
