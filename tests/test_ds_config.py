"""ds_config.json as its users write it: what becomes of each key, and the result."""

import json

import pytest

from jaxspeed import ds_config
from jaxspeed.config import Batch, Config, Run
from jaxspeed.ds_config.batch import solve
from jaxspeed.ds_config.optimizer import DEFAULTS, NOT_BUILT
from jaxspeed.ds_config.schedule import SCHEDULERS
from jaxspeed.ds_config.verdicts import AUTO, FEATURES, IGNORED, KNOWN, SETS
from jaxspeed.mesh import MeshShape
from jaxspeed.models import SparseConfig
from jaxspeed.optim import (
    LossScale,
    OneCycle,
    Optimizer,
    Precision,
    RangeTest,
    Schedule,
)
from jaxspeed.parallel.zero import Zero

TUTORIAL = {
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": {
        "type": "Adam",
        "params": {
            "lr": 0.001,
            "betas": [0.8, 0.999],
            "eps": 1e-8,
            "weight_decay": 3e-7,
        },
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": 0.001,
            "warmup_num_steps": 1000,
        },
    },
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "wall_clock_breakdown": False,
}

MEGATRON = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 10,
    "zero_optimization": {
        "stage": 2,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "reduce_bucket_size": 5e8,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
    "gradient_clipping": 1.0,
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "hysteresis": 4,
        "min_loss_scale": 1,
        "initial_scale_power": 20,
    },
    "activation_checkpointing": {
        "partition_activations": True,
        "contiguous_memory_optimization": True,
    },
    "wall_clock_breakdown": True,
    "zero_allow_untested_optimizer": True,
}

BING_BERT = {
    "train_batch_size": 65536,
    "train_micro_batch_size_per_gpu": 64,
    "steps_per_print": 1000,
    "prescale_gradients": True,
    "gradient_predivide_factor": 8.0,
    "optimizer": {
        "type": "Lamb",
        "params": {
            "lr": 11e-3,
            "weight_decay": 0.01,
            "bias_correction": False,
            "max_coeff": 0.3,
            "min_coeff": 0.01,
        },
    },
    "gradient_clipping": 1.0,
    "wall_clock_breakdown": False,
    "fp16": {"enabled": True, "loss_scale": 128},
    "sparse_attention": {"mode": "dense", "block": 16},
}

HUGGING_FACE = {
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 2e-5, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": 2e-6,
            "warmup_max_lr": 2e-5,
            "warmup_num_steps": 100,
            "warmup_type": "linear",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 1e4,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": None,
        "zero_quantized_weights": False,
        "zero_hpz_partition_size": 1,
    },
    "communication_data_type": "fp32",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "wandb": {"enabled": False},
}


def verdict_of(config, key):
    found = [each for each in ds_config.report(config) if each.key == key]
    assert len(found) == 1, found
    return found[0]


def verdicts(config):
    return {each.key: each.verdict for each in ds_config.report(config)}


def test_tutorial():
    assert ds_config.to_config(TUTORIAL, num_data_shards=4) == Config(
        batch=Batch(size=16, accumulation=1),
        run=Run(log_every=2000),
        optimizer=Optimizer(
            name="adamw",
            learning_rate=0.001,
            betas=(0.8, 0.999),
            epsilon=1e-8,
            weight_decay=3e-7,
            clip_norm=1.0,
            decay="all",
            schedule=Schedule(kind="WarmupLR", warmup_steps=1000, start=0.0),
        ),
    )


def test_megatron():
    config = ds_config.to_config(MEGATRON, num_data_shards=16)
    assert config.batch == Batch(size=128, accumulation=2)
    assert config.zero == Zero(stage=2)
    assert config.precision == Precision(
        "float16", LossScale(initial_power=20, window=500, hysteresis=4)
    )
    assert config.remat == "full"
    assert config.optimizer.schedule.kind == "constant"
    seen = verdicts(MEGATRON)
    assert seen["zero_optimization.cpu_offload"] == "honoured"
    assert seen["zero_optimization.reduce_bucket_size"] == "no-op"
    assert seen["wall_clock_breakdown"] == "no-op"
    assert "refused" not in seen.values()


def test_bing_bert():
    config = ds_config.to_config(BING_BERT, num_data_shards=64)
    assert config.batch == Batch(size=65536, accumulation=16)
    assert config.precision.loss_scale == LossScale(static=128.0)
    assert config.optimizer == Optimizer(
        name="lamb",
        learning_rate=11e-3,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.01,
        bias_correction=False,
        trust_ratio=(0.01, 0.3),
        decay="all",
        schedule=Schedule(kind="constant"),
    )
    assert verdicts(BING_BERT)["prescale_gradients"] == "no-op"
    assert verdict_of(BING_BERT, "sparse_attention.mode").verdict == "honoured"
    assert verdicts(BING_BERT)["sparse_attention.block"] == "no-op"
    assert config.model == Config().model


def test_hugging_face_stage_3():
    config = ds_config.to_config(HUGGING_FACE, num_data_shards=8)
    assert config.batch == Batch(size=64, accumulation=4)
    assert config.zero == Zero(stage=3, min_size=10_001, reduce_dtype="float32")
    assert config.precision.compute == "bfloat16"
    schedule = config.optimizer.schedule
    assert (schedule.kind, schedule.warmup_shape) == ("WarmupDecayLR", "linear")
    assert schedule.start == pytest.approx(0.1) and schedule.total_steps is None
    seen = verdicts(HUGGING_FACE)
    assert seen["zero_optimization.offload_optimizer"] == "honoured"
    assert seen["zero_optimization.offload_param"] == "honoured"
    assert seen["zero_optimization.zero_quantized_weights"] == "honoured"
    assert seen["fp16.initial_scale_power"] == "no-op"
    assert seen["zero_optimization.reduce_bucket_size"] == "no-op"
    assert seen["train_batch_size"] == "honoured"


@pytest.mark.parametrize(
    "config",
    [TUTORIAL, MEGATRON, BING_BERT, HUGGING_FACE],
    ids=["tutorial", "megatron", "bing_bert", "hugging_face"],
)
def test_every_key_has_one_verdict_in_the_order_of_the_file(config):
    def expand(values, path=""):
        for name, value in values.items():
            key = f"{path}.{name}" if path else name
            if isinstance(value, dict) and key not in FEATURES:
                yield from expand(value, key)
            else:
                yield key

    assert [each.key for each in ds_config.report(config)] == list(expand(config))


def batch(train=None, micro=None, accumulation=None):
    names = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    )
    values = zip(names, (train, micro, accumulation), strict=True)
    return {name: value for name, value in values if value is not None}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (batch(32, 4, 2), (32, 2)),
        (batch(32, 4), (32, 2)),
        (batch(32, None, 2), (32, 2)),
        (batch(None, 4, 2), (32, 2)),
        (batch(32), (32, 1)),
        (batch(None, 4), (16, 1)),
        (batch("auto", 4, 2), (32, 2)),
        (batch(32, "auto", 2), (32, 2)),
        (batch(32, 4, "auto"), (32, 2)),
        (batch(32, "auto"), (32, 1)),
        (batch(32.0, 4), (32, 2)),
    ],
)
def test_batch_triple(given, expected):
    result = ds_config.to_config(given, num_data_shards=4).batch
    assert (result.size, result.accumulation) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            batch(32, 4, 3),
            "train_batch_size 32 is not the product of train_micro_batch_size_per_gpu "
            "4, gradient_accumulation_steps 3 and 4 devices",
        ),
        (batch(30, 4), r"accumulation_steps 1 \(the nearest\) and 4 devices"),
        (batch(2), "train_batch_size 2 is not the product"),
        (batch(None, None, 2), "sets neither train_batch_size nor"),
        ({}, "sets neither train_batch_size nor"),
        (batch(0), "train_batch_size is 0; it must be 1 or more"),
        (batch(8.5), "train_batch_size is 8.5; it must be a whole number"),
    ],
)
def test_batch_triple_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        ds_config.to_config(given, num_data_shards=4)


def test_solve_agrees_with_the_identity():
    for train in range(1, 40):
        try:
            size, accumulation = solve({"train_batch_size": train}, 4)
        except ValueError:
            assert train % 4
        else:
            assert (size, accumulation) == (train, 1)


@pytest.mark.parametrize(
    ("given", "auto"),
    [
        (batch("auto", "auto", "auto"), 3),
        (batch("auto", 4, "auto"), 2),
        (batch(None, 4, "auto"), 1),
        (batch("auto", None, 2), 1),
    ],
)
def test_auto_batches_that_nothing_determines_are_refused(given, auto):
    refused = [each for each in ds_config.report(given) if each.verdict == "refused"]
    assert len(refused) == auto
    assert all("write a number" in each.does for each in refused)


@pytest.mark.parametrize(
    "config",
    [
        {"gradient_clipping": "auto"},
        {"bf16": {"enabled": "auto"}},
        {"fp16": {"enabled": True, "loss_scale_window": "auto"}},
        {"zero_optimization": {"stage": "auto"}},
        {
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": "auto",
            }
        },
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
        {
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"warmup_num_steps": "auto", "total_num_steps": 10},
            }
        },
        {"communication_data_type": "auto"},
        {"steps_per_print": "auto"},
    ],
    ids=str,
)
def test_auto_is_refused_with_what_to_write(config):
    (refused,) = [x for x in ds_config.report(config) if x.verdict == "refused"]
    assert '"auto" cannot be resolved here; write ' in refused.does


FEATURES_ON = {
    "zero_optimization.offload_optimizer": {"device": "cpu"},
    "zero_optimization.offload_param": {"device": "nvme", "nvme_path": "/x"},
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "zero_optimization.zeropp_loco_param": {"err_beta": 0.8},
    "zero_optimization.zero_hpz_partition_size": 8,
    "managed_gradient_accumulation": False,
    "sequence_parallel_size": 2,
    "tensor_parallel.partition_config": {"layer_specs": []},
    "tensor_parallel.tp": {"tp_size": 2},
    "pipeline.stages": 4,
    "compression_training": {
        "weight_quantization": {"shared_parameters": {"enabled": True}}
    },
    "weight_quantization": {"post_init_quant": {}},
}


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("key", sorted(FEATURES))
def test_feature_on_is_refused_and_off_is_honoured(key):
    switch = FEATURES[key].get("switch")
    on = FEATURES_ON.get(key, {"enabled": True} if switch == "enabled" else True)
    refused = verdict_of(nested(key, on), key)
    assert refused.verdict == "refused"
    assert len(refused.does) > 20
    for value in (None, *FEATURES[key].get("off", [False])):
        if switch in ("enabled", "any enabled") and value is False:
            value = {}
        off = value if switch is None or not value else {switch: value}
        assert verdict_of(nested(key, off), key).verdict == "honoured"


DOCUMENTED = {
    "mode": "fixed",
    "block": 16,
    "different_layout_per_head": True,
    "num_local_blocks": 4,
    "num_global_blocks": 1,
    "attention": "bidirectional",
    "horizontal_global_attention": False,
    "num_different_global_patterns": 4,
    "num_random_blocks": 0,
    "local_window_blocks": [4],
    "global_block_indices": [0],
    "global_block_end_indices": None,
    "num_sliding_window_blocks": 3,
}
"""The block in DeepSpeed's documentation, with a key for every mode."""


def sparse_of(**changes):
    return config_of(sparse_attention=DOCUMENTED | changes).model.attention.sparse


def test_sparse_attention_becomes_a_layout():
    assert sparse_of() == SparseConfig(
        "fixed",
        different_layout_per_head=True,
        attention="bidirectional",
        num_local_blocks=4,
        num_global_blocks=1,
        horizontal_global_attention=False,
        num_different_global_patterns=4,
    )
    seen = verdicts({"sparse_attention": DOCUMENTED})
    assert seen["sparse_attention.num_local_blocks"] == "honoured"
    assert seen["sparse_attention.local_window_blocks"] == "no-op"
    for mode in ("variable", "bigbird", "bslongformer", "local_sliding_window"):
        found = sparse_of(mode=mode, num_different_global_patterns=1)
        assert mode.startswith(found.mode)
    assert sparse_of(mode="variable").local_window_blocks == (4,)


def test_sparse_attention_without_a_mode_or_random_blocks():
    assert config_of(sparse_attention={"block": 32}).model.attention.sparse == (
        SparseConfig("fixed", block=32)
    )
    found = config_of(sparse_attention={"mode": "bigbird", "attention": "x"})
    assert found.model.attention.sparse == SparseConfig("bigbird", num_random_blocks=0)
    assert verdict_of({"sparse_attention": {}}, "sparse_attention").verdict == "refused"
    with pytest.raises(
        ValueError, match=r"sparse_attention.mode is 'strided'; it must"
    ):
        config_of(sparse_attention={"mode": "strided"})
    with pytest.raises(ValueError, match=r"attention.sparse: num_global_blocks=3 shou"):
        config_of(sparse_attention={"num_global_blocks": 3})


def test_compression_is_off_unless_a_technique_is_enabled():
    groups = {"row_pruning": {"shared_parameters": {"enabled": False}}}
    key = "compression_training"
    assert verdict_of({key: groups}, key).verdict == "honoured"
    groups["layer_reduction"] = {"enabled": True, "teacher_layer": [0, 1]}
    assert verdict_of({key: groups}, key).verdict == "refused"


@pytest.mark.parametrize("key", sorted(IGNORED))
def test_ignored_keys_say_why(key):
    verdict = verdict_of(nested(key, True), key)
    assert verdict.verdict == "no-op" and len(verdict.does) > 20


def test_every_key_of_the_table_is_reachable_and_listed_once():
    parts = [*IGNORED, *FEATURES, *SETS]
    assert len(parts) == len(set(parts))
    assert set(AUTO) <= KNOWN
    prefixes = [
        (short, long)
        for short in KNOWN
        for long in KNOWN
        if long.startswith(f"{short}.")
    ]
    assert not prefixes, "the longer key would never be reached"


def test_refused_keys_are_all_listed_with_what_to_do():
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 2, "cpu_offload": True},
        "flops_profiler": {"enabled": True},
        "optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 9}},
    }
    with pytest.raises(ValueError, match="refused keys: 4") as error:
        ds_config.to_config(config, num_data_shards=1)
    for text in ("cpu_offload: ", "jaxspeed train --profile", "1-bit Adam is not"):
        assert text in str(error.value)


@pytest.mark.parametrize("name", ["OneBitAdam", "OnebitAdam", "ZEROONEADAM", "MuSGD"])
def test_optimizer_types_are_read_in_any_case(name):
    config = {"optimizer": {"type": name}}
    assert verdict_of(config, "optimizer.type").does == NOT_BUILT[name.lower()]
    with pytest.raises(ValueError, match=r"AdamMax.*give js.initialize"):
        config_of(optimizer=dict(type="AdamMax"))


def optimizer_of(kind, **params):
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": kind, "params": params},
        "gradient_clipping": 0,
    }
    return ds_config.to_config(config, num_data_shards=1).optimizer


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_optimizer_defaults_are_deepspeeds(name):
    optimizer = optimizer_of(name)
    assert optimizer.name == ("adamw" if name == "adam" else name)
    assert optimizer.weight_decay == 0.0 and optimizer.decay == "all"
    assert optimizer.clip_norm is None
    if name in ("adam", "adamw", "lamb", "lion"):
        assert optimizer.betas == (0.9, 0.999) and optimizer.learning_rate == 1e-3


def test_adam_is_adamw_unless_told_otherwise():
    assert optimizer_of("Adam").name == "adamw"
    assert optimizer_of("Adam", adam_w_mode=True).name == "adamw"
    assert optimizer_of("Adam", adam_w_mode=False).name == "adam"
    assert optimizer_of("AdamW", adam_w_mode=False).name == "adamw"
    assert optimizer_of("AdamW", torch_adam=True).weight_decay == 0.01


def test_muon_has_two_rates():
    default = optimizer_of("Muon")
    assert (default.learning_rate, default.adam_learning_rate) == (0.02, 3e-4)
    both = optimizer_of("Muon", lr=1e-3)
    assert (both.learning_rate, both.adam_learning_rate) == (1e-3, 1e-3)
    two = optimizer_of("Muon", lr=1e-3, muon_lr=0.05, ns_method="gram")
    assert (two.learning_rate, two.adam_learning_rate) == (0.05, 1e-3)


@pytest.mark.parametrize(
    ("params", "key", "does"),
    [
        (dict(max_grad_norm=1.0), "max_grad_norm", "set gradient_clipping"),
        (dict(amsgrad=True), "amsgrad", "only False is built"),
        (dict(lr="auto"), "lr", '"auto" cannot be resolved'),
    ],
)
def test_optimizer_parameters_refused(params, key, does):
    config = {"optimizer": {"type": "Adam", "params": params}}
    verdict = verdict_of(config, f"optimizer.params.{key}")
    assert verdict.verdict == "refused" and does in verdict.does


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(lr="1e-3"), "optimizer.params.lr is '1e-3'; it must be one number"),
        (dict(lr=[1e-3]), r"optimizer.params.lr is \[0.001\]"),
        (dict(betas=0.9), "optimizer.params.betas is 0.9.*two numbers"),
        (dict(betass=[0.9]), "'optimizer.params.betass'; did you mean .*betas'"),
        (dict(momentum=0.9), "unknown key 'optimizer.params.momentum'"),
    ],
)
def test_optimizer_parameters_that_are_wrong(params, message):
    with pytest.raises(ValueError, match=message):
        ds_config.report({"optimizer": {"type": "Adam", "params": params}})


def schedule_of(kind, optimizer="Adam", **params):
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": optimizer, "params": {"lr": 0.5}},
        "scheduler": {"type": kind, "params": params},
    }
    built = ds_config.to_config(config, num_data_shards=1).optimizer
    return built.learning_rate, built.schedule


def test_schedulers_become_schedules():
    assert schedule_of("WarmupLR", warmup_num_steps=0) == (
        0.5,
        Schedule(kind="WarmupLR", warmup_steps=2),
    )
    assert schedule_of("WarmupDecayLR", total_num_steps=50) == (
        1e-3,
        Schedule(kind="WarmupDecayLR", warmup_steps=1000, total_steps=50),
    )
    assert schedule_of("WarmupCosineLR", total_num_steps=50, warmup_min_ratio=0.25) == (
        0.5,
        Schedule(
            kind="WarmupCosineLR",
            warmup_steps=1000,
            start=0.25,
            floor=1e-4,
            total_steps=50,
        ),
    )
    assert schedule_of("LRRangeTest", lr_range_test_min_lr=0.25) == (
        0.25,
        Schedule(kind="LRRangeTest", range_test=RangeTest()),
    )


def test_one_cycle():
    rate, schedule = schedule_of(
        "OneCycle", cycle_min_lr=0.125, cycle_max_lr=0.25, decay_step_size=3
    )
    assert rate == 0.25
    cycle = OneCycle(decay_steps=3)
    assert schedule == Schedule(kind="OneCycle", start=0.5, one_cycle=cycle)


def test_one_cycle_moves_betas_only_where_there_are_any():
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}
    _, schedule = schedule_of("OneCycle", optimizer="SGD", **params)
    assert not schedule.one_cycle.cycle_momentum
    config = {"scheduler": {"type": "OneCycle", "params": params}}
    out = ds_config.translate(config)
    assert out.fields["optimizer.betas"] == (0.9, 0.99)
    assert any("second to 0.99" in note for note in out.notes)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmupDecayLR", {}, "total_num_steps is missing; WarmupDecayLR needs it"),
        ("OneCycle", {}, "cycle_max_lr is missing"),
        ("WarmupLR", {"warmup_min_lr": [0, 1]}, "it must be one number"),
        ("WarmupLR", {"warmup_num_step": 1}, r"did you mean .*warmup_num_steps'\?"),
        ("WarmupLR", {"warmup_type": "cubic"}, "warmup_shape is 'cubic'"),
    ],
)
def test_scheduler_parameters_that_are_wrong(kind, params, message):
    with pytest.raises(ValueError, match=message):
        ds_config.report({"scheduler": {"type": kind, "params": params}})


def test_other_schedulers_are_refused():
    config = {"scheduler": {"type": "CosineAnnealingLR"}}
    verdict = verdict_of(config, "scheduler.type")
    assert verdict.verdict == "refused" and all(k in verdict.does for k in SCHEDULERS)


def config_of(**keys):
    return ds_config.to_config({"train_batch_size": 8, **keys}, num_data_shards=8)


def test_precision():
    assert config_of(bf16=dict(enabled=True)).precision == Precision("bfloat16")
    assert config_of(bfloat16=dict(enabled=True)).precision == Precision("bfloat16")
    assert config_of(fp16=dict(enabled=False)).precision == Precision("float32")
    autocast = dict(enabled=True, dtype="torch.float16")
    assert config_of(torch_autocast=autocast).precision.compute == "float16"
    both = config_of(torch_autocast=autocast, bf16=dict(enabled=True))
    assert both.precision.compute == "bfloat16"
    with pytest.raises(ValueError, match=r"fp16.enabled and bf16.enabled are both"):
        config_of(fp16=dict(enabled=True), bf16=dict(enabled=True))
    with pytest.raises(ValueError, match="bf16 and bfloat16 are one key"):
        config_of(bfloat16={}, bf16={})
    with pytest.raises(ValueError, match="communication_data_type is 'int8'"):
        config_of(communication_data_type="int8")


def test_data_types_are_honoured_where_they_are_so_anyway():
    config = {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bf16"},
    }
    assert set(verdicts(config).values()) == {"honoured"}
    config["data_types"]["grad_accum_dtype"] = "bf16"
    assert verdicts(config)["data_types.grad_accum_dtype"] == "refused"


def test_clipping_that_is_not_set_is_said_aloud():
    assert config_of().optimizer.clip_norm == 1.0
    assert config_of(gradient_clipping=0).optimizer.clip_norm is None
    notes = ds_config.translate({}).notes
    assert any("gradient_clipping is not set" in note for note in notes)
    set_here = ds_config.translate({"gradient_clipping": 0.5}).notes
    assert not any("gradient_clipping" in note for note in set_here)


def test_sum_of_gradients_is_refused():
    verdict = verdict_of({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op")
    assert verdict.verdict == "refused"
    mean = verdict_of({"gradient_allreduce_op": "mean"}, "gradient_allreduce_op")
    assert mean.verdict == "honoured"


def test_zero_stages():
    for stage in (0, 1, 2):
        assert config_of(zero_optimization=dict(stage=stage)).zero == Zero(stage)
    assert config_of(zero_optimization=dict(stage=3)).zero == Zero(3, min_size=100_001)
    assert config_of(zero_optimization=True).zero == Zero(1)
    with pytest.raises(ValueError, match=r"zero.stage is 4; it must be 0, 1, 2 or 3"):
        config_of(zero_optimization=dict(stage=4))
    with pytest.raises(ValueError, match=r"zero_optimization.stage is 'three'"):
        config_of(zero_optimization=dict(stage="three"))


def test_mics_is_the_replica_axis():
    zero = dict(stage=3, mics_shard_size=4)
    assert config_of(zero_optimization=zero).mesh == MeshShape(replica=2, data=4)
    off = dict(stage=3, mics_shard_size=-1)
    assert config_of(zero_optimization=off).mesh == MeshShape()
    with pytest.raises(ValueError, match="mics_shard_size 3 does not divide the 8"):
        config_of(zero_optimization=dict(stage=3, mics_shard_size=3))


def test_parallel_sizes():
    assert config_of(tensor_parallel=dict(autotp_size=4)).mesh == MeshShape(tensor=4)
    assert config_of(data_parallel_size=8).mesh == MeshShape()
    with pytest.raises(ValueError, match=r"data_parallel_size is 4, but .* over 8"):
        config_of(data_parallel_size=4)
    passes = {"compile": {"deepcompile": True, "passes": ["z3", "autosp"]}}
    assert verdicts(passes) == {
        "compile.deepcompile": "no-op",
        "compile.passes": "refused",
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batchsize": 8}, "'train_batchsize'; did you mean 'train_batch_size'"),
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'"),
        (
            {"zero_optimization": {"overlap_com": True}},
            "did you mean 'zero_optimization.overlap_comm'",
        ),
        ({"stage": 3}, "'stage'; did you mean 'zero_optimization.stage'"),
        (
            {"offload_param": {}},
            "'offload_param'; did you mean 'zero_optimization.offload_param'",
        ),
        ({"flops_profiler": {"enable": True}}, "did you mean 'flops_profiler.enabled'"),
        (
            {"tensorboard": {"qqqq": 1}},
            "'tensorboard.qqqq'; tensorboard has the keys enabled, job_name",
        ),
    ],
)
def test_unknown_key_names_the_nearest(config, message):
    with pytest.raises(ds_config.UnknownKeyError, match=message):
        ds_config.report(config)


def test_blocks_have_to_be_objects():
    with pytest.raises(ValueError, match=r"fp16 is True; it must be an object .*hyst"):
        ds_config.report({"fp16": True})
    with pytest.raises(ValueError, match="wandb is 'on'; it must be an object"):
        ds_config.report({"wandb": "on"})
    assert verdicts({"fp16": {}, "bf16": None}) == {"fp16": "no-op", "bf16": "no-op"}


def test_legacy_keys_are_accepted():
    legacy = {"disable_allgather": True, "cuda_visible_devices": "0,1"}
    assert set(verdicts(legacy).values()) == {"no-op"}


def write(tmp_path, text):
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n  "b": }', "ds_config.json, line 2, column 8: .*plain JSON"),
        ('{"fp16": {"enabled": true, "enabled": false}}', "'enabled' occurs twice"),
        ("[1]", "holds a list, not a JSON object"),
        ("", "line 1, column 1"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        ds_config.read(path)
    assert ds_config.run(path) == 2


def test_dicts_are_not_changed():
    config = {"bfloat16": {"enabled": True}, "zero_optimization": True}
    ds_config.report(config)
    assert config == {"bfloat16": {"enabled": True}, "zero_optimization": True}


def test_command_prints_json(tmp_path, capsys):
    path = write(tmp_path, json.dumps(TUTORIAL))
    assert ds_config.run(path, json_output=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {tuple(key) for key in printed["keys"]} == {("key", "verdict", "does")}
    assert {key["verdict"] for key in printed["keys"]} == {"honoured", "no-op"}
    assert printed["keys"][0]["key"] == "train_batch_size"


def test_command_prints_a_table(tmp_path, capsys):
    config = {**MEGATRON, "tensorboard": {"enabled": True}}
    del config["gradient_clipping"]
    assert ds_config.run(write(tmp_path, json.dumps(config))) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["tensorboard", "refused"] for line in lines)
    assert any(line.startswith("note: gradient_clipping") for line in lines)
    assert lines[-1].endswith("1 refused")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batchsize": 8}, "did you mean 'train_batch_size'"),
        ({"zero_optimization": {"stage": 7}}, "zero.stage is 7"),
    ],
)
def test_command_fails_with_one_line(tmp_path, capsys, config, message):
    assert ds_config.run(write(tmp_path, json.dumps(config))) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and message in captured.err


def test_command_names_a_missing_file(tmp_path, capsys):
    assert ds_config.run(tmp_path / "absent.json") == 2
    assert "no DeepSpeed configuration" in capsys.readouterr().err
