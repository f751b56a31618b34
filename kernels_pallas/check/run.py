"""Cases compiled in processes of their own, a few at a time."""

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import pickle
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence

from kernels_pallas.check import gpu, tpu, worker
from kernels_pallas.check.case import Case
from kernels_pallas.check.chips import CHIPS
from kernels_pallas.check.result import Result

SECONDS = 600.0
"""That one case may take on one platform's chips together."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A case of a kernel, and the chips to compile it for, all of its platform."""

    kernel: str
    case: Case
    chips: tuple[str, ...]


def measure(case: Case, *chips: str, kernel: str = "") -> list[Result]:
    """Compiles a case for the named chips, of its platform; see `chips.CHIPS`.

    Raises:
        ValueError: an unknown chip, or one of another platform.
    """
    for name in chips:
        if name not in CHIPS or CHIPS[name].platform != case.platform:
            known = [x for x, chip in CHIPS.items() if chip.platform == case.platform]
            raise ValueError(
                f"case {case.name!r} is for platform {case.platform!r}, not for chip "
                f"{name!r}; choose among {known}"
            )
    return list(run([Task(kernel, case, chips)], workers=1))


def run(tasks: Iterable[Task], workers: int | None = None) -> Iterator[Result]:
    """Results in the order in which they are found.

    Args:
        tasks: what to compile.
        workers: processes at a time; as many as there are processors by default.
    """
    results: queue.Queue[Result | None] = queue.Queue()
    tasks = list(tasks)
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        running = [pool.submit(_run_task, task, results) for task in tasks]
        for future in running:
            future.add_done_callback(lambda _: results.put(None))
        ended = 0
        while ended < len(running):
            found = results.get()
            if found is None:
                ended += 1
            else:
                yield found
        for future in running:
            future.result()


def _run_task(task: Task, results: "queue.Queue[Result | None]") -> None:
    """Starts over behind a chip whose compiler ended the process."""
    left = collections.deque(task.chips)
    while left:
        answers, complaint = _run_process(dataclasses.replace(task, chips=tuple(left)))
        for answer in answers:
            results.put(answer)
            left.popleft()
        if left and complaint:
            results.put(
                Result(task.kernel, task.case.name, left.popleft(), "failed", complaint)
            )


def _run_process(task: Task) -> tuple[Sequence[Result], str]:
    """The results of one process, and why there are fewer than chips if so."""
    command = [sys.executable, "-m", "kernels_pallas.check.worker"]
    message = pickle.dumps((task.kernel, task.case, task.chips))
    with tempfile.TemporaryDirectory(prefix="kernels_pallas_check_") as folder:
        dump = pathlib.Path(folder) / "dump"
        dump.mkdir()
        errors = pathlib.Path(folder) / "errors"
        complaint = ""
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=_environment(str(dump)),
            )
            try:
                output, _ = process.communicate(message, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                complaint = f"not compiled within {SECONDS:.0f} s"
        answers = [Result(**json.loads(line)) for line in output.splitlines()]
        if not complaint and len(answers) < len(task.chips):
            tail = errors.read_text(errors="replace").strip()[-500:]
            complaint = f"the compiler ended with status {process.returncode}: {tail}"
    return answers, complaint


def _environment(dump: str) -> dict[str, str]:
    """The process' variables: no device, no cache of compiled programs, our paths."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path),
        worker.DUMP: dump,
        **tpu.environment(dump),
        **gpu.environment(dump),
    }
