"""The process that compiles: one case, for every chip asked for.

Reads a pickled `(kernel, case, chips)` from its standard input and writes one line of
JSON per chip to its standard output. It is a process of its own because the compilers
read their flags once, write where they were first told to, and may end the process.
"""

import dataclasses
import json
import os
import pathlib
import pickle
import sys
import time

from kernels_pallas.check import gpu, tpu
from kernels_pallas.check.case import Case
from kernels_pallas.check.chips import CHIPS, Gpu
from kernels_pallas.check.result import NoCompiler, NoDump, Result

DUMP = "KERNELS_PALLAS_CHECK_DUMP"
"""Names the variable with the folder that the compilers write into."""


def measure(kernel: str, case: Case, name: str) -> Result:
    """Compiles a case for the chip called `name`."""
    chip, dump = CHIPS[name], pathlib.Path(os.environ[DUMP])
    start = time.perf_counter()
    status, reason, figures = "compiled", "", {}
    try:
        if isinstance(chip, Gpu):
            figures = gpu.measure(case, chip, dump)
        else:
            figures = tpu.measure(case, chip, dump)
    except NoCompiler as error:
        status, reason = "skipped", str(error)
    except NoDump as error:
        reason = f"not counted: {error}"
    except Exception as error:  # whatever the compiler has against the case
        status, reason = "failed", f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    return Result(kernel, case.name, name, status, reason, seconds, figures)


def main() -> None:
    """Answers on standard output; what the compilers print there joins the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kernel, case, chips = pickle.load(sys.stdin.buffer)
    for name in chips:
        result = measure(kernel, case, name)
        answers.write(json.dumps(dataclasses.asdict(result)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
