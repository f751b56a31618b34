"""The command line: `jaxspeed COMMAND`, the same as `python -m jaxspeed COMMAND`."""

import argparse
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxspeed.commands import bench, convert, ds_config, env, generate, plan, train

COMMANDS: dict[str, tuple[Any, str]] = {
    "train": (train, "train a decoder on text, or go on with a run"),
    "plan": (plan, "memory, traffic and time of a run, for devices that are not there"),
    "generate": (generate, "continue a prompt with a trained model"),
    "convert": (convert, "Hugging Face folder to run folder and back"),
    "ds-config": (ds_config, "what each key of a DeepSpeed configuration does here"),
    "bench": (bench, "measure what the README claims"),
    "env": (env, "devices, versions, and what is missing for what"),
}
SIMULATED_DEVICES = 8
CONFIGURED = ("train", "plan")
"""Commands that take --config and fields of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; a user's mistake is one line and exit status 2."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command not in CONFIGURED:
        parser.error(f"unknown arguments for {known.command}: {' '.join(rest)}")
    try:
        _prepare_devices(known)
        return COMMANDS[known.command][0].run(known, rest)
    except KeyboardInterrupt:
        print(f"jaxspeed {known.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if known.traceback:
            raise
        print(f"jaxspeed {known.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxspeed",
        description="Train and serve large models in JAX, on TPU, GPU or a laptop.",
        epilog="jaxspeed COMMAND --help tells more about one command.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, does) in COMMANDS.items():
        command = commands.add_parser(name, help=does, allow_abbrev=False)
        if name in CONFIGURED:
            command.epilog = (
                "Any field of the configuration can follow: --config.zero.stage=2"
            )
            command.add_argument(
                "--config",
                metavar="FILE",
                help="a .py file with get_config(), or .gin or .json",
            )
        module.add_arguments(command)
        if module is not plan:  # it runs on no device
            _add_device_arguments(command)
        command.add_argument(
            "--traceback", action="store_true", help="show where an error came from"
        )
    return parser


def _add_device_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("devices and processes")
    group.add_argument(
        "--cpu-devices",
        type=int,
        default=SIMULATED_DEVICES,
        metavar="N",
        help="devices to simulate where there is no TPU or GPU (default %(default)s)",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="process 0 of a run over several processes; 'auto' on a cluster that JAX "
        "knows (TPU pods, Slurm)",
    )
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I")


def _prepare_devices(arguments: argparse.Namespace) -> None:
    """Settings that must stand before JAX first looks for devices."""
    if arguments.command == "plan":
        _look_only_for("cpu")
        _simulate(plan.simulated_devices(arguments))
        return
    if arguments.cpu_devices < 1:
        raise ValueError(f"--cpu-devices={arguments.cpu_devices}; give at least 1")
    if not any(_device_files("accel*", "vfio/*", "nvidia*", "kfd", "dxg")):
        # An installed libtpu or CUDA plugin would look for its device, at length.
        _look_only_for(os.environ.get("JAX_PLATFORMS", "cpu"))
    _simulate(arguments.cpu_devices)
    if arguments.coordinator == "auto":
        jax.distributed.initialize()
    elif arguments.coordinator:
        if arguments.num_processes is None or arguments.process_id is None:
            raise ValueError(
                "--coordinator=HOST:PORT needs --num-processes and --process-id too"
            )
        jax.distributed.initialize(
            arguments.coordinator, arguments.num_processes, arguments.process_id
        )


def _look_only_for(platforms: str) -> None:
    """Has JAX, and processes started from here, use no other platforms."""
    os.environ["JAX_PLATFORMS"] = platforms
    jax.config.update("jax_platforms", platforms)


def _simulate(count: int) -> None:
    """Has JAX show `count` CPU devices, unless XLA_FLAGS says how many."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def _device_files(*patterns: str) -> Iterator[pathlib.Path]:
    """Files that drivers of accelerators make."""
    for pattern in patterns:
        yield from pathlib.Path("/dev").glob(pattern)
