"""`jaxspeed plan --search`: the best way to run a model on a topology."""

import argparse
import json
import sys
from typing import Any

from tqdm import tqdm

from jaxspeed.chips import CHIPS
from jaxspeed.commands.table import table
from jaxspeed.config import Config
from jaxspeed.plan.config_file import write_config
from jaxspeed.plan.estimate import estimate
from jaxspeed.plan.search import GB, Point, Search, search
from jaxspeed.plan.topology import num_devices

OUTPUT = "searched.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the search."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        action="store_true",
        help="find mesh, ZeRO stage, remat policy and micro-batch",
    )
    group.add_argument(
        "--global-batch",
        type=int,
        metavar="N",
        help="sequences in a step (default: what the configuration has)",
    )
    group.add_argument(
        "--time-budget",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="no compile is begun that would end later (default %(default)s)",
    )
    group.add_argument(
        "--output",
        default=OUTPUT,
        metavar="FILE",
        help="where the best is written, .py or .json (default %(default)s)",
    )
    group.add_argument(
        "--chip",
        choices=sorted(CHIPS),
        help="judge by this chip's memory and speed (default: the topology's)",
    )


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Searches, writes the best, and shows the table; 0 even if nothing fits."""
    batch = arguments.global_batch
    if batch is None:
        batch = estimate(config, num_devices(arguments.topology)).global_batch
    found = search(
        config,
        arguments.topology,
        global_batch=batch,
        time_budget=arguments.time_budget,
        chip=CHIPS[arguments.chip] if arguments.chip else None,
        say=lambda line: tqdm.write(line, file=sys.stderr),
    )
    written = None
    if found.best is not None:
        written = arguments.output
        write_config(
            found.best.candidate.config,
            written,
            description(found, found.best, written),
        )
    if arguments.json:
        print(json.dumps(found.as_json() | {"written": written}, indent=2))
    else:
        print("\n".join(_summary(found, written)))
    return 0


def description(found: Search, best: Point, path: str) -> str:
    """What the written file says of itself."""
    return (
        f"The best way found to run {found.global_batch} sequences per step on "
        f"{found.topology}.\n\n"
        f"    jaxspeed train --config={path}\n\n"
        f"{best.candidate.name}.\n"
        f"By the compiled program each device reserves {best.bytes / GB:.2f} of "
        f"{found.chip.usable_hbm_bytes / GB:.2f} GB,\n"
        f"and a step takes at least {best.seconds:.4g} s, bound by {best.limit}."
    )


def _summary(found: Search, written: str | None) -> list[str]:
    lines = [table([_row(point, found) for point in found.points]), ""]
    if found.left:
        why = "no time" if found.out_of_time else "not among the best few"
        lines.append(f"not compiled ({why}): {len(found.left)} candidates")
    took = f"{found.seconds:.0f} s for {found.considered} candidates"
    if written is None:
        return [*lines, f"nothing fits ({took}); use more devices or shorter sequences"]
    return [*lines, f"the best is written to {written} ({took})"]


def _row(point: Point, found: Search) -> dict[str, Any]:
    best = "best" if point is found.best else ""
    return {
        "": best or ("front" if point in found.front else ""),
        "candidate": point.candidate.name,
        "GB": round(point.bytes / GB, 2),
        "estimate GB": round(point.candidate.estimate.total_bytes / GB, 2),
        "seconds": point.seconds,
        "estimate s": point.candidate.estimate.expected_seconds or 0.0,
        "limited by": point.limit,
    }
