"""The plan of a run: its contract, and that it plans the step that `train` runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspeed as js
from jaxspeed import plan
from jaxspeed.chips import CHIPS
from jaxspeed.config import Batch, Config
from jaxspeed.data import Data, train_batches
from jaxspeed.mesh import MeshShape
from jaxspeed.models import AttentionConfig, DecoderConfig, FeedForwardConfig
from jaxspeed.plan.advice import what_would_fit
from jaxspeed.plan.model_state import model_state
from jaxspeed.plan.placements import whole_leaves
from jaxspeed.plan.report import batch_shapes
from jaxspeed.train.loop import make_decoder

CONFIG = Config(
    model=DecoderConfig(
        dim=64,
        num_layers=2,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=16),
        feed_forward=FeedForwardConfig(hidden_dim=192),
    ),
    mesh=MeshShape(data=4, tensor=2),
    zero=js.Zero(stage=3, min_size=512),
    batch=Batch(per_device=1),
    data=Data(sequence_length=32),
)
CONTRACT = {
    "topology": str,
    "devices": int,
    "mesh": dict,
    "params": int,
    "per_device": dict,
    "fits": bool,
    "collectives": list,
    "bytes_by_axis": dict,
    "flops_per_device": int,
    "roofline_seconds": dict,
    "mfu_bound": (float, type(None)),
    "compile_seconds": float,
    "replicated_leaves": list,
}
PER_DEVICE = (
    *("params_bytes", "optimizer_bytes", "temp_bytes"),
    *("peak_bytes", "host_bytes", "hbm_bytes"),
)


def with_(config=CONFIG, **fields):
    return dataclasses.replace(config, **fields)


@pytest.fixture(scope="module")
def made():
    return plan.report(CONFIG, "cpu:8")


def check_contract(json_object):
    for name, kind in CONTRACT.items():
        assert isinstance(json_object[name], kind), name
    assert set(PER_DEVICE) <= set(json_object["per_device"])
    assert set(json_object["roofline_seconds"]) == {"compute", "memory", "network"}
    for row in json_object["collectives"]:
        assert {"op", "axes", "count", "bytes_per_step"} <= set(row)


def test_the_contract(made):
    found = json.loads(json.dumps(made.as_json()))
    check_contract(found)
    assert found["devices"] == 8 and found["fits"]
    assert found["mesh"]["data"] == 4 and found["mesh"]["tensor"] == 2
    assert {"data", "tensor"} <= set(found["bytes_by_axis"])
    assert found["roofline_seconds"]["compute"] is None  # simulated devices
    assert len(found["buffers"]) == 10


def test_the_state_is_what_the_program_is_given(made):
    arguments = sum(b.bytes for b in made.memory.buffers if b.kind == "parameter")
    batch = 5 * 4 * 1 * 32
    state = made.state.params_bytes + made.state.optimizer_bytes
    assert arguments == state + batch
    assert made.gradient_bytes == made.state.params_bytes  # float32 shards, both
    assert made.memory.pool_bytes == made.temp_bytes


def test_the_step_is_the_one_that_train_runs(made):
    mesh = js.make_mesh(CONFIG.mesh)
    config = CONFIG.sized_for(mesh)
    engine = js.initialize(config, lambda rngs: make_decoder(config, rngs), mesh=mesh)
    batches = train_batches(config.data, config.batch.size)
    batch = next(batches)
    batches.close()
    given = {k: (np.shape(v), np.asarray(v).dtype) for k, v in batch.items()}
    planned = {k: (v.shape, v.dtype) for k, v in batch_shapes(config).items()}
    assert given == planned
    compiled = engine.lower(batch).compile()
    sent = plan.summarise(plan.collectives(compiled, mesh))
    assert sent == plan.summarise(made.collectives)


def test_what_stays_whole_is_said_with_the_reason(made):
    rows = {row["leaf"]: row for row in made.replicated}
    assert set(rows) == set(made.state.replicated)
    assert rows["head/norm/scale"]["shape"] == [64]
    assert rows["head/norm/scale"]["bytes"] == 256
    assert (
        "64 elements per layer, under zero.min_size=512"
        in (rows["head/norm/scale"]["reason"])
    )


def test_a_leaf_that_no_axis_divides_is_said_to_be_so():
    model = dataclasses.replace(CONFIG.model, dim=66, num_layers=1)
    feed_forward = FeedForwardConfig(hidden_dim=33)
    model = dataclasses.replace(model, feed_forward=feed_forward)
    config = with_(model=model, mesh=MeshShape(data=4))
    sizes = dataclasses.asdict(config.mesh)
    rows = whole_leaves(config.zero, model_state(config, sizes), sizes)
    reasons = {row["leaf"]: row["reason"] for row in rows}
    assert reasons["layers/feed_forward/up"] == "no dim of (66, 33) divides by data 4"


@pytest.mark.parametrize(
    "changes, topology, message",
    [
        (dict(mesh=MeshShape(data=3)), "cpu:8", "topology cpu:8 has 8 devices; mesh"),
        (dict(mesh=MeshShape(tensor=3)), "cpu:8", "does not divide 8 devices"),
        (dict(mesh=MeshShape(seq=2)), "cpu:8", "'seq' is not"),
        (dict(batch=Batch(size=6)), "cpu:8", "batch.size=6 does not divide by 4"),
        (dict(mesh=MeshShape(tensor=8)), "cpu:8", "tensor can be one of"),
        ({}, "v7:2x2", "unknown topology 'v7:2x2'"),
    ],
)
def test_mistakes_are_named(changes, topology, message):
    with pytest.raises(ValueError) as error:
        plan.report(with_(**changes), topology)
    assert message in str(error.value)


def test_an_indivisible_dim_names_layer_dim_and_sizes():
    with pytest.raises(ValueError) as error:
        plan.report(with_(mesh=MeshShape(data=1, tensor=8)), "cpu:8")
    for word in ("tensor=8", "'heads'", "layers/attention/", "[1, 2, 4]"):
        assert word in str(error.value)


LARGE = with_(
    model=DecoderConfig(
        vocab_size=32000,
        dim=2048,
        num_layers=24,
        attention=AttentionConfig(heads=16, kv_heads=16, head_dim=128),
        feed_forward=FeedForwardConfig(hidden_dim=8192),
    ),
    mesh=MeshShape(data=8),
    zero=js.Zero(stage=1),
    remat="none",
    batch=Batch(size=32),
    data=Data(sequence_length=2048),
)


def test_advice_suffices_by_the_same_formula():
    chip = CHIPS["v5e"]
    now = plan.estimate(LARGE, 8, chip).total_bytes
    missing = now - chip.usable_hbm_bytes
    found = what_would_fit(LARGE, 8, chip, missing)
    assert missing > 0 and found and all(each.enough for each in found)
    together = with_(
        LARGE,
        zero=js.Zero(stage=3),
        remat="full",
        batch=Batch(size=32, accumulation=4),
    )
    words = "--config.batch.accumulation=4 --config.remat=full --config.zero.stage=3"
    saved = {each.change: each.saves_bytes for each in found}[words]
    assert saved == now - plan.estimate(together, 8, chip).total_bytes


def test_without_a_change_that_suffices_the_largest_come_first():
    chip = CHIPS["v5e"]
    found = what_would_fit(LARGE, 8, chip, 10**15)
    saved = [each.saves_bytes for each in found]
    assert saved == sorted(saved, reverse=True) and not any(e.enough for e in found)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x4", "tpu7x:2x2x1"])
def test_a_tpu_has_times_and_limits(topology):
    config = with_(mesh=MeshShape(data=8), precision=js.Precision("bfloat16"))
    made = plan.report(config, topology)
    found = made.as_json()
    check_contract(found)
    assert found["fits"] and found["chip"] == topology.partition(":")[0]
    assert 0 < found["mfu_bound"] < 1
    assert found["step_seconds"] >= max(
        found["roofline_seconds"]["compute"], found["roofline_seconds"]["memory"]
    )
    assert all(0 <= row["hidden"] <= 1 for row in found["collectives"])
    assert found["per_device"]["reserved_bytes"] < found["per_device"]["hbm_bytes"]


@pytest.mark.tpu_aot
def test_what_does_not_fit_is_an_answer():
    config = with_(LARGE, precision=js.Precision("bfloat16"))
    found = plan.report(config, "v5e:2x4").as_json()
    assert not found["fits"] and "Ran out of memory" in found["refusal"]
    per_device = found["per_device"]
    assert per_device["reserved_bytes"] > per_device["usable_hbm_bytes"]
    assert found["advice"] and found["collectives"] and found["buffers"]


def test_batch_shapes_are_those_of_the_configuration():
    shapes = batch_shapes(with_(batch=Batch(size=3)))
    assert shapes["weights"] == jax.ShapeDtypeStruct((3, 32), jnp.float32)
