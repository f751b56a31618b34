"""`plan.estimate` beside the TPU compiler: memory, traffic, and time per step."""

from typing import Any

from jaxspeed.chips import CHIPS
from jaxspeed.config import Batch, Config
from jaxspeed.data import Data
from jaxspeed.mesh import MeshShape
from jaxspeed.models.layers import AttentionConfig, FeedForwardConfig
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.optim import Precision
from jaxspeed.parallel.zero import Zero
from jaxspeed.plan.estimate import estimate
from jaxspeed.plan.report import report

TOPOLOGY, DEVICES = "v5e:2x4", 8
MODEL = DecoderConfig(
    vocab_size=32768,
    dim=2048,
    num_layers=8,
    attention=AttentionConfig(heads=16, kv_heads=8, head_dim=128),
    feed_forward=FeedForwardConfig(hidden_dim=5632),
)
# ZeRO stage, remat policy, sequences on a device, micro-batches, size of `tensor`.
GRID = (
    (0, "full", 1, 1, 1),
    (1, "full", 1, 1, 1),
    (2, "full", 1, 1, 1),
    (3, "full", 1, 1, 1),
    (3, "full", 4, 1, 1),
    (3, "full", 1, 4, 1),
    (3, "dots", 1, 1, 1),
    (3, "none", 1, 1, 1),
    (3, "full", 1, 1, 2),
)


def run() -> list[dict[str, Any]]:
    """One row per point of the grid; ratios are estimate over compiler."""
    return [measure(*point) for point in GRID]


def measure(
    stage: int, remat: str, sequences: int, accumulation: int, tensor: int
) -> dict[str, Any]:
    """Compiles one step and compares."""
    config = Config(
        model=MODEL,
        mesh=MeshShape(tensor=tensor),
        zero=Zero(stage=stage),
        precision=Precision(compute="bfloat16"),
        batch=Batch(per_device=sequences, accumulation=accumulation),
        data=Data(sequence_length=4096),
        remat=remat,
    )
    guess = estimate(config, DEVICES, CHIPS[TOPOLOGY.partition(":")[0]])
    found = report(config, TOPOLOGY).as_json()
    reserved = found["per_device"]["reserved_bytes"]
    sent = sum(found["bytes_by_axis"].values())
    return {
        "stage": stage,
        "remat": remat,
        "sequences": sequences,
        "accumulation": accumulation,
        "tensor": tensor,
        "reserved_bytes": reserved,
        "memory_ratio": guess.total_bytes / reserved,
        "bytes_sent": sent,
        "sent_ratio": sum(guess.bytes_by_axis.values()) / sent,
        "flops_ratio": guess.flops_per_device / found["flops_per_device"],
        "step_seconds": found["step_seconds"],
        "seconds_ratio": (guess.expected_seconds or 0.0) / found["step_seconds"],
        "compile_seconds": found["compile_seconds"],
    }
