"""`jaxspeed ds-config FILE`: a verdict on every key of a DeepSpeed configuration."""

import argparse

from jaxspeed import ds_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("file", help="a ds_config.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """0: nothing is refused; 1: something is; 2: an unknown key or a malformed file."""
    return ds_config.run(arguments.file, arguments.json)
