"""`python -m kernels_pallas.check`: every kernel compiled and counted, without a chip.

Each folder's `cases.py` is compiled for TPU generations and a GPU, in processes of
their own. Ends with 1 if a case does not compile or exceeds its stored limit by more
than 5%, with 2 on a mistake in the arguments. A missing compiler is named and passes.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from kernels_pallas.check import discover, limits, table
from kernels_pallas.check.chips import CHIPS
from kernels_pallas.check.result import Result
from kernels_pallas.check.run import Task, run


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; the status to exit with."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.check",
        description="Compile kernels for chips that are not there; count cycles, "
        "instructions, registers and spills.",
    )
    parser.add_argument("--kernel", nargs="+", default=[], help="folders; default: all")
    parser.add_argument("--chip", nargs="+", default=[], help=", ".join(CHIPS))
    parser.add_argument("--json", action="store_true", help="one object, not a table")
    parser.add_argument(
        "--store", action="store_true", help="make the counts the limits from now on"
    )
    arguments = parser.parse_args(words)
    try:
        tasks = discover.tasks(arguments.kernel, arguments.chip)
    except ValueError as error:
        print(f"kernels_pallas.check: {error}", file=sys.stderr)
        return 2
    results = _run(tasks)
    if arguments.store:
        print(f"{limits.store(results)} limits in {limits.FILE}", file=sys.stderr)
    stored = limits.load()
    if arguments.json:
        print(json.dumps(_report(results, stored)))
    else:
        tables = [table.table(results, platform) for platform in table.COLUMNS]
        print("\n\n".join(text for text in tables if text))
        for remark in table.remarks(results, stored):
            print(remark)
    bad = [x for x in results if x.status == "failed" or limits.excess(x, stored)]
    return 1 if bad else 0


def _run(tasks: Sequence[Task]) -> list[Result]:
    """All results; a line on standard error as each is found."""
    total, start, results = sum(len(task.chips) for task in tasks), time.time(), []
    for result in run(tasks):
        results.append(result)
        print(
            f"[{len(results)}/{total}, {time.time() - start:.0f} s] {result.kernel}, "
            f"{result.case}, {result.chip}: {result.status}",
            file=sys.stderr,
            flush=True,
        )
    return results


def _report(results: Sequence[Result], stored: limits.Limits) -> dict[str, object]:
    rows = [
        {**dataclasses.asdict(x), "excess": limits.excess(x, stored)} for x in results
    ]
    compilers = {name: limits.compiler(name) for name in CHIPS}
    return {"name": "kernels", "rows": rows, "environment": compilers}


if __name__ == "__main__":
    sys.exit(main())
