"""The compiler options that `train` sets, taken away: what of the traffic is hidden.

Compiles a ZeRO-3 step with layers of Llama 3 8B, sequences of 8192, for a few chips of
every TPU generation and for a host of GPUs, where `train` sets none and one is tried.
Four layers: two of them run in the loop whose overlap counts.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jaxspeed import plan
from jaxspeed.bench import pods
from jaxspeed.config import Config
from jaxspeed.train import compiler

TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1", "h200:8")
TRIED = {"h200": {"xla_gpu_enable_latency_hiding_scheduler": True}}
"""Options that `train` does not set."""

LAYERS = 4
NONE = "none of them"
ALL = "as train sets them"


def run() -> list[dict[str, Any]]:
    """A row per topology and set of options, where the compiler is installed.

    Raises:
        ImportError: no compiler is.
    """
    topologies = [each for each in TOPOLOGIES if _has_compiler(each)]
    if not topologies:
        raise ImportError(
            "no compiler for TPU or GPU is installed: pip install 'jaxspeed[plan]' for "
            "TPU, 'jaxspeed[check]' for both"
        )
    config = pods.configuration("8B")
    model = dataclasses.replace(config.model, num_layers=LAYERS)
    config = dataclasses.replace(config, model=model)
    return [
        measure(config, topology, name, options)
        for topology in topologies
        for name, options in variants(topology.partition(":")[0]).items()
    ]


def _has_compiler(topology: str) -> bool:
    try:
        return bool(plan.topology_devices(topology))
    except ImportError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False


def variants(chip: str) -> dict[str, Mapping[str, Any]]:
    """Sets of options by name: all, none, and all without one group of them."""
    every, tried = compiler.OPTIONS.get(chip, {}), TRIED.get(chip, {})
    extra = {name: every[name] for name in every if name not in compiler.TPU}
    found: dict[str, Mapping[str, Any]] = {NONE: {}}
    if every:
        found[ALL] = every
    if extra:
        found[f"without {', '.join(extra)}"] = compiler.TPU
    if tried:
        found[f"with {', '.join(tried)}"] = tried
    return found


def measure(
    config: Config, topology: str, name: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Plans one step that is compiled with `options`."""
    print(f"compiling for {topology}, options: {name}", file=sys.stderr, flush=True)
    chip = topology.partition(":")[0]
    with _compiled_with(chip, options):
        timeline = plan.report(config, topology).timeline
    assert timeline is not None, "every TPU is a known chip"
    looped = [entry for entry in timeline.entries if entry.collective.count > 1]
    sent = sum(entry.collective.bytes_sent for entry in looped)
    hidden = sum(entry.hidden * entry.collective.bytes_sent for entry in looped)
    return {
        "topology": topology,
        "options": name,
        "hidden": timeline.hidden,
        "hidden_in_loops": hidden / sent,
        "step_seconds": timeline.seconds,
        "compute_seconds": timeline.compute_seconds,
        "exposed_seconds": timeline.exposed_seconds,
    }


@contextlib.contextmanager
def _compiled_with(chip: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Steps built meanwhile are compiled with other options than `train` sets."""
    usual = dict(compiler.OPTIONS)
    compiler.OPTIONS[chip] = dict(options)
    try:
        yield
    finally:
        compiler.OPTIONS.clear()
        compiler.OPTIONS.update(usual)
