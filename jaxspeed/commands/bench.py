"""`jaxspeed bench NAME`: measures, and shows a table or one JSON object."""

import argparse
import json

from jaxspeed.bench import BENCHES
from jaxspeed.commands.table import table
from jaxspeed.environment import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("name", choices=sorted(BENCHES), help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the bench's rows."""
    rows = BENCHES[arguments.name]()
    if arguments.json:
        result = {"name": arguments.name, "rows": rows, "environment": environment()}
        print(json.dumps(result, indent=2))
    else:
        print(table(rows))
    return 0
