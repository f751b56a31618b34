"""`jaxspeed plan`: what each device will hold, send and compute, before a job runs."""

import argparse
import json
import os
import re
from typing import Any

from jaxspeed import gin_config
from jaxspeed.commands import plan_search
from jaxspeed.commands.progress import elapsed
from jaxspeed.commands.table import table
from jaxspeed.commands.units import duration, size
from jaxspeed.config import Config, load, override
from jaxspeed.plan.report import Report, report
from jaxspeed.plan.topology import num_devices
from jaxspeed.train.default import default_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument(
        "--topology",
        default="cpu:8",
        metavar="T",
        help="cpu:8, v5e:4x4, v5p:8x8x8, v6e:16x16, tpu7x:2x2x1, h200:8, ... (default "
        "%(default)s); TPUs need libtpu: pip install 'jaxspeed[plan]', GPUs JAX's CUDA "
        "plugin: pip install 'jaxspeed[check]'",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    plan_search.add_arguments(parser)


def simulated_devices(arguments: argparse.Namespace) -> int:
    """CPU devices that JAX must show: those of `cpu:N` or of the default run."""
    count = num_devices(arguments.topology)
    is_cpu = arguments.topology.startswith("cpu:")
    return count if is_cpu or arguments.config is None else 1


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Compiles and prints the plan; 0 also when it does not fit: that is an answer."""
    config = override(_base(arguments.config), overrides)
    if arguments.search:
        return plan_search.run(arguments, config)
    with elapsed(f"compiling for {arguments.topology}"):
        made = report(config, arguments.topology)
    if arguments.json:
        print(json.dumps(made.as_json(), indent=2))
    else:
        print(summary(made, config))
    return 0


def _base(path: str | None) -> Config:
    if path is None:
        return default_config()
    return gin_config.load(path) if path.endswith(".gin") else load(path)


def summary(made: Report, config: Config) -> str:
    """One screen: memory, the largest buffers, traffic, time, and the verdict."""
    parts = [
        _headline(made, config),
        table(_memory_rows(made)),
        table(_buffer_rows(made)),
    ]
    if made.collectives:
        parts.append(table(_collective_rows(made)))
    parts += [_time(made), _replicated(made), _verdict(made)]
    return "\n\n".join(part for part in parts if part)


def _headline(made: Report, config: Config) -> str:
    axes = {axis: size for axis, size in made.mesh.items() if size > 1}
    split = " x ".join(f"{a} {n}" for a, n in (axes or {"data": 1}).items())
    devices = "1 device" if made.devices == 1 else f"{made.devices} devices"
    return (
        f"{made.topology}: {devices} as {split}, ZeRO stage "
        f"{config.zero.stage}, remat {config.remat}, {config.precision.compute}\n"
        f"{made.state.num_params:,} parameters, {made.global_batch} sequences of "
        f"{made.sequence_length} tokens per step; compiled in "
        f"{made.compile_seconds:.1f} s"
    )


def _memory_rows(made: Report) -> list[dict[str, Any]]:
    memory, state = made.memory, made.state
    sizes = {
        "weights": state.params_bytes,
        "optimizer state": state.optimizer_bytes,
        "gradients, by ZeRO's table": made.gradient_bytes,
        "pool of temporary values": memory.pool_bytes,
        "in use at most": memory.peak_bytes,
        "reserved": memory.reserved_bytes,
        "host memory": made.host_bytes,
    }
    if made.chip is not None:
        sizes[f"usable on a {made.chip.name}"] = made.chip.usable_hbm_bytes
    return [
        {"memory per device": name, "size": f"{size(count):>9}"}
        for name, count in sizes.items()
    ]


def _buffer_rows(made: Report) -> list[dict[str, Any]]:
    """The largest temporary values, and a few of the state's leaves beside them."""
    temporary = [b for b in made.memory.buffers if b.kind == "temporary"][:8]
    other = [b for b in made.memory.buffers if b.kind != "temporary"][:4]
    return [
        {
            "size": f"{size(each.bytes):>9}",
            "largest at the peak": each.shape,
            "from": _short(each.source) or each.name,
        }
        for each in sorted(temporary + other, key=lambda each: -each.bytes)
    ]


def _short(source: str) -> str:
    """File and line without the folders above, and the end of the operation's name."""
    place, _, name = source.partition(" ")
    if not name:
        return place
    place = re.sub(rf".*{re.escape(os.sep)}(?=(?:[^/\\]+[/\\])?[^/\\]+$)", "", place)
    last = "/".join(name.split("/")[-2:])
    return f"{place} {last}"[:72]


def _collective_rows(made: Report) -> list[dict[str, Any]]:
    return [
        {
            "collective": row["op"],
            "axes": "+".join(row["axes"]),
            "per step": row["count"],
            "sent": f"{size(row['bytes_per_step']):>9}",
            "overlapped": "-" if row["hidden"] is None else f"{row['hidden']:.0%}",
        }
        for row in made.collective_rows()[:10]
    ]


def _time(made: Report) -> str:
    flops = (
        f"{made.flops.total / 1e12:.4g} TFLOP per device and step; the model needs "
        f"{made.model_flops / made.devices / 1e12:.4g}"
    )
    if made.flops.unknown_kernels:
        names = ", ".join(sorted(made.flops.unknown_kernels))
        flops += f"; kernels that do not say: {names}"
    line = made.timeline
    if line is None or made.mfu_bound is None:
        return f"{flops}\nno times: {made.topology.partition(':')[0]} has no known peak"
    network = ", ".join(
        f"{axes} {duration(seconds)}" for axes, seconds in line.network_seconds.items()
    )
    return (
        f"{flops}\nat the chip's peaks: compute {duration(line.compute_seconds)}, "
        f"memory {duration(line.memory_seconds)}, network {network or 'nothing'}\n"
        f"a step takes at least {duration(line.seconds)}, "
        f"{duration(line.exposed_seconds)} of it waiting for the network: model-FLOPs "
        f"utilisation at most {made.mfu_bound:.1%}"
    )


def _replicated(made: Report) -> str:
    if not made.replicated:
        return ""
    whole = sum(row["bytes"] for row in made.replicated)
    first = made.replicated[0]
    more = len(made.replicated) - 1
    return (
        f"whole on every device: {first['leaf']} ({first['reason']})"
        + (f" and {more} more" if more else "")
        + f", {size(whole)}"
    )


def _verdict(made: Report) -> str:
    if made.chip is None:
        return "fits: simulated devices have no limit"
    usable = made.chip.usable_hbm_bytes
    room = usable - made.memory.reserved_bytes
    if made.fits:
        return f"fits, with {size(room)} per device to spare"
    lines = [f"DOES NOT FIT: {size(-room)} per device too much"]
    if room >= 0 and made.refusal is not None:
        lines = [f"DOES NOT FIT: {made.refusal.message}"]
    if any(each.enough for each in made.advice):
        lines.append("what would make it fit, by formula (plan it to be sure):")
    elif made.advice:
        lines.append("what saves the most, by formula (none is enough alone):")
    for each in made.advice:
        lines.append(f"  {each.change}: saves {size(each.saves_bytes)}")
    return "\n".join(lines)
