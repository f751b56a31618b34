"""Bytes on the network: compiled programs against the closed formulas of `plan.volume`.

Every ZeRO stage on meshes of 8 simulated devices that mix every axis a strategy exists
for. The bytes of each axis are compared on their own. Beside the formula a step only
sends scalars, the loss and norms of gradients, some over axes that it does not have.
"""

from typing import Any

from jaxspeed.config import Batch, Config
from jaxspeed.data import Data
from jaxspeed.mesh import MeshShape
from jaxspeed.models.layers import AttentionConfig, FeedForwardConfig
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.parallel.zero import Zero
from jaxspeed.plan.estimate import estimate
from jaxspeed.plan.report import report

MODEL = DecoderConfig(
    vocab_size=512,
    dim=128,
    num_layers=4,
    attention=AttentionConfig(heads=8, kv_heads=4, head_dim=16),
    feed_forward=FeedForwardConfig(hidden_dim=384),
)
MESHES = {
    "data 8": dict(data=8),
    "data 4 x tensor 2": dict(data=4, tensor=2),
    "data 2 x tensor 2 x replica 2": dict(data=2, tensor=2, replica=2),
    "tensor 8": dict(tensor=8),
    "data 2 x expert 2 x tensor 2": dict(data=2, expert=2, tensor=2),
    "replica 2 x data 4": dict(replica=2, data=4),
}
"""Those of the contract that every strategy is tested against one device with."""


def run() -> list[dict[str, Any]]:
    """One row per mesh and stage."""
    return [measure(name, stage) for name in MESHES for stage in (0, 1, 2, 3)]


def measure(name: str, stage: int) -> dict[str, Any]:
    """Compiles one step and compares its bytes with the formula's."""
    config = Config(
        model=MODEL,
        mesh=MeshShape(**MESHES[name]),
        zero=Zero(stage=stage),
        batch=Batch(16),
        data=Data(sequence_length=128),
    )
    counted = report(config, "cpu:8").as_json()["bytes_by_axis"]
    expected = estimate(config, 8).bytes_by_axis
    differences = {
        axis: abs(counted.get(axis, 0) - sent) / sent for axis, sent in expected.items()
    }
    worst = max(differences, key=lambda axis: differences[axis])
    beside = sum(sent for axis, sent in counted.items() if axis not in expected)
    return {
        "mesh": name,
        "stage": stage,
        "bytes_sent": sum(counted.values()),
        "formula_bytes_sent": sum(expected.values()),
        "sent_ratio": sum(counted.values()) / sum(expected.values()),
        "worst_axis": worst,
        "worst_difference": differences[worst],
        "bytes_on_other_axes": beside,
    }
