"""Exact resume: an interrupted run against one that was left alone."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax

from jaxspeed.config import Batch, Config, Run
from jaxspeed.mesh import MeshShape
from jaxspeed.models.layers import AttentionConfig, FeedForwardConfig
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.parallel.zero import Zero
from jaxspeed.train.loop import train
from jaxspeed.train.record import read_metrics

STEPS, STOP = 20, 8


def run() -> list[dict[str, Any]]:
    """Losses after the interruption, on the same mesh and on others."""
    count = jax.device_count()
    if count % 2:
        raise ValueError(f"bench resume needs an even number of devices, not {count}")
    first = _config(MeshShape(data=count // 2, tensor=2), stage=3)
    cases = {
        "the same": first,
        "another mesh": _config(MeshShape(data=count), stage=3),
        "another stage": _config(MeshShape(data=count // 2, tensor=2), stage=1),
        "another mesh and stage": _config(
            MeshShape(replica=2, data=count // 2), stage=2
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        whole = _losses(first, f"{folder}/whole", STEPS)
        rows = []
        for number, (name, second) in enumerate(cases.items()):
            workdir = f"{folder}/{number}"
            _losses(first, workdir, STOP)
            resumed = _losses(second, workdir, STEPS)
            differences = [abs(a - b) for a, b in zip(whole, resumed, strict=True)]
            rows.append(
                {
                    "resumed_on": name,
                    "stopped_after": STOP,
                    "steps": STEPS,
                    "last_loss": resumed[-1],
                    "uninterrupted_last_loss": whole[-1],
                    "largest_difference": max(differences),
                }
            )
    return rows


def _config(mesh: MeshShape, stage: int) -> Config:
    return Config(
        model=DecoderConfig(
            dim=64,
            num_layers=2,
            attention=AttentionConfig(heads=4, kv_heads=2, head_dim=16),
            feed_forward=FeedForwardConfig(hidden_dim=160),
        ),
        mesh=mesh,
        zero=Zero(stage=stage, min_size=256),
        batch=Batch(size=16),
        run=Run(steps=STEPS, evaluate_batches=1, log_every=STEPS),
    )


def _losses(config: Config, workdir: str, until: int) -> list[float]:
    """Trains up to step `until` with the schedule of the whole run."""
    schedule = dataclasses.replace(config.optimizer.schedule, total_steps=STEPS)
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, schedule=schedule),
        run=dataclasses.replace(config.run, steps=until),
        data=dataclasses.replace(config.data, sequence_length=64),
    )
    train(config, workdir, lambda line: None)
    rows = read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]
