"""Profiles a training run: its modules, a trace of some steps, where time went."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxspeed.models.parameters import abstract_decoder
from jaxspeed.profiler.device_time import device_time, newest_trace
from jaxspeed.profiler.modules import count
from jaxspeed.profiler.table import table

WARM_UP = 3
"""Steps before the trace begins: the first compiles, the next fill the pipeline."""
DEFAULT_STEPS = 3
PARTS = {
    "data": "wait for the next batch",
    "step": "hand the step to the devices (simulated ones: run it)",
    "metrics": "wait for the devices",
    "save": "save a checkpoint",
    "evaluate": "evaluate",
}
"""Parts of a step as the training loop names them."""


class Profile:
    """Observes `train.loop.train`: give it as `observer`, inside of its own `with`.

    It writes `modules.txt` and `modules.json` (the work of a step by module), a trace
    of some steps for XProf and Perfetto, and `step_time.json`. What goes wrong in
    profiling is said and ends the profile, not the run.

    Args:
        folder: where everything is written.
        steps: steps to trace.
        say: prints a line for the user.

    Raises:
        ValueError: `steps` is below 1.
    """

    def __init__(
        self, folder: pathlib.Path, steps: int, say: Callable[[str], None]
    ) -> None:
        if steps < 1:
            raise ValueError(f"--profile={steps}; give a number of steps, at least 1")
        self._folder, self._steps, self._say = folder, steps, say
        self._first = self._last = math.inf  # until the run begins
        self._started: float | None = None
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._traced: set[int] = set()
        self._done = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends a trace that the run did not reach the end of."""
        if self._started is not None:
            self._guarded(self._finish)
        elif not self._done:
            self._say("no trace: the run made no step")

    def begin(self, engine: Any, state: Any, batch: Any) -> None:
        """Before the first step of the run, which is not taken yet."""
        before, total = int(state.step), engine.config.run.steps
        warm_up = max(0, min(WARM_UP, total - before - self._steps))
        self._first = before + 1 + warm_up
        self._last = self._first + self._steps - 1
        self._guarded(lambda: self._count(engine, state, batch))

    @contextlib.contextmanager
    def span(self, part: str, step: int) -> Iterator[None]:
        """Around one part of a step, a name in `PARTS`."""
        if not self._done and self._started is None and step >= self._first:
            self._guarded(self._start)
        start = time.perf_counter()
        with self._annotation(part, step):
            yield
        if self._started is None:
            return
        self._seconds[part] += time.perf_counter() - start
        if part == "step":
            self._traced.add(step)
        if part == "metrics" and step >= self._last:
            self._guarded(self._finish)

    def _annotation(self, part: str, step: int) -> Any:
        if self._started is None:
            return contextlib.nullcontext()
        if part == "step":
            return jax.profiler.StepTraceAnnotation("train", step_num=step)
        return jax.profiler.TraceAnnotation(part)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a profile is not worth a run
            self._started, self._done = None, True
            self._say(f"profile: {type(error).__name__}: {error}")

    def _count(self, engine: Any, state: Any, batch: Any) -> None:
        model = abstract_decoder(engine.config.model)
        counted = count(lambda: engine.step(state, batch), model=model)
        devices = engine.mesh.size
        self._say(
            f"\none training step by module, all {devices} devices together; FLOPs are "
            "those of matmuls, backward has what is computed again:\n" + table(counted)
        )
        self._write("modules.txt", table(counted))
        values = {"devices": devices, "total": counted.as_json()}
        self._write("modules.json", json.dumps(values, indent=1) + "\n")

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python calls would fill the trace
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._started = time.perf_counter()

    def _finish(self) -> None:
        assert self._started is not None
        wall = time.perf_counter() - self._started
        self._started, self._done = None, True
        jax.profiler.stop_trace()
        if self._traced:
            self._report(wall)

    def _report(self, wall: float) -> None:
        steps = len(self._traced)
        seconds = {part: total / steps for part, total in self._seconds.items()}
        seconds["rest"] = wall / steps - sum(seconds.values())
        trace = newest_trace(self._folder)
        devices = device_time(trace) if trace else None
        lines = [
            f"\nsteps {min(self._traced)} to {max(self._traced)} take "
            f"{1e3 * wall / steps:.1f} ms each:"
        ]
        for part, value in seconds.items():
            what = PARTS.get(part, "all else on the host")
            share = value * steps / wall
            lines.append(f"  {1e3 * value:9.2f} ms  {share:6.1%}  {what}")
        if devices:
            lines.append(
                f"devices (mean of {devices.devices}): compute {devices.compute:.1%}, "
                f"collectives that nothing hides {devices.collectives:.1%}, idle "
                f"{devices.idle:.1%}"
            )
        if trace:
            events = trace.name.replace(".xplane.pb", ".trace.json.gz")
            lines.append(
                f"to see the trace:  pip install xprof && xprof {self._folder}\n"
                f"or open {trace.with_name(events)} in https://ui.perfetto.dev"
            )
        self._say("\n".join(lines) + "\n")
        values = {
            "steps": sorted(self._traced),
            "step_seconds": wall / steps,
            "host_seconds": seconds,
            "device_shares": vars(devices) if devices else None,
        }
        self._write("step_time.json", json.dumps(values, indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_text(text)
