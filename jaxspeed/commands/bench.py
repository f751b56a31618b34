"""`jaxspeed bench NAME`: measures, and shows a table or one JSON object."""

import argparse
import json

from jaxspeed.bench import BENCHES, OF_RUNS
from jaxspeed.commands.table import table
from jaxspeed.environment import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("name", choices=sorted(BENCHES), help="what to measure")
    parser.add_argument(
        "--run",
        metavar="FOLDER",
        help=f"a trained model to measure, for {', '.join(OF_RUNS)}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the bench's rows."""
    name, folder = arguments.name, arguments.run
    if folder is None:
        rows = BENCHES[name]()
    elif name in OF_RUNS:
        rows = OF_RUNS[name](folder)
    else:
        raise ValueError(
            f"bench {name} takes no --run={folder}; these do: {', '.join(OF_RUNS)}"
        )
    if arguments.json:
        result = {"name": name, "rows": rows, "environment": environment()}
        print(json.dumps(result, indent=2))
    else:
        print(table(rows))
    return 0
