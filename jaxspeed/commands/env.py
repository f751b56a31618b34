"""`jaxspeed env`: devices, versions, interconnect, and what is missing for what."""

import argparse
import json

from jaxspeed.environment import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the report."""
    facts, lines = report()
    print(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines))
    return 0
