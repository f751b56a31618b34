"""Llama 3 on TPU pods, by compilation: memory, bytes against ZeRO's formula, overlap.

Compiles the training step of 8B and 70B, ZeRO-3 over all devices, sequences of 8192,
one per device, full recomputation, for each topology, as `jaxspeed plan` does. A
compile takes minutes; what the same source compiled before is taken from the cache.
"""

import sys
from typing import Any

from jaxspeed import plan
from jaxspeed.config import Batch, Config
from jaxspeed.data import Data
from jaxspeed.models.layers import AttentionConfig, FeedForwardConfig, PositionConfig
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.optim import Optimizer, Precision, Schedule
from jaxspeed.parallel.zero import Zero
from jaxspeed.plan import cache

LLAMA_3 = PositionConfig(
    max_length=131072, theta=500000.0, scaling="llama3", factor=8.0
)


def _llama(dim: int, layers: int, heads: int, hidden: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128256,
        dim=dim,
        num_layers=layers,
        attention=AttentionConfig(heads=heads, kv_heads=8, head_dim=128),
        feed_forward=FeedForwardConfig(hidden_dim=hidden),
        position=LLAMA_3,
    )


MODELS = {
    "8B": _llama(4096, 32, 32, 14336),
    "70B": _llama(8192, 80, 64, 28672),
}
TOPOLOGIES = {
    "8B": (
        "v5p:2x2x1 v5p:2x2x2 v5p:2x2x4 v5p:4x4x4 v5p:8x8x8 v5e:2x4 v5e:4x4 v5e:8x8 "
        "v5e:16x16 v6e:2x4 v6e:4x4 v6e:8x8 v6e:16x16 tpu7x:2x2x1 tpu7x:2x2x2 "
        "tpu7x:2x4x4 tpu7x:4x8x8"
    ).split(),
    "70B": "v5p:4x4x4 v5p:8x8x8 v5e:16x16 v6e:16x16 tpu7x:2x4x4 tpu7x:4x8x8".split(),
}
"""What is compiled, smallest first; v5e and v6e pods have 256 chips."""


def run() -> list[dict[str, Any]]:
    """One row per model and topology."""
    cases = [(name, each) for name in MODELS for each in TOPOLOGIES[name]]
    return [measure(name, topology) for name, topology in cases]


def configuration(name: str) -> Config:
    """That of `configs/llama3_8b.py` and `configs/llama3_70b.py`."""
    return Config(
        model=MODELS[name],
        zero=Zero(stage=3, min_size=100_000),
        precision=Precision(compute="bfloat16"),
        optimizer=Optimizer(schedule=Schedule(warmup_steps=100)),
        batch=Batch(per_device=1),
        data=Data(sequence_length=8192),
    )


def measure(name: str, topology: str) -> dict[str, Any]:
    """Plans one model on one topology."""
    config = configuration(name)
    found = cache.read(config, topology)
    if found is None:
        print(f"compiling {name} for {topology}", file=sys.stderr, flush=True)
        found = plan.report(config, topology).as_json()
        cache.write(config, topology, found)
    return row(name, found)


def row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of one plan; bytes are per device and step."""
    devices, memory = found["devices"], found["per_device"]
    sent = sum(found["bytes_by_axis"].values())
    # Two gathers and one reduction of every bfloat16 weight.
    formula = 3 * 2 * found["params"] * (devices - 1) / devices
    return {
        "model": name,
        "topology": found["topology"],
        "devices": devices,
        "fits": found["fits"],
        "state_gb": (memory["params_bytes"] + memory["optimizer_bytes"]) / 1e9,
        "temp_gb": memory["temp_bytes"] / 1e9,
        "peak_gb": memory["peak_bytes"] / 1e9,
        "sent_gb": sent / 1e9,
        "sent_over_3_psi": sent / formula,
        "hidden": found.get("hidden"),
        "step_seconds": found.get("step_seconds"),
        "mfu_bound": found["mfu_bound"],
        "compile_seconds": found["compile_seconds"],
    }
