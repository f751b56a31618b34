"""The main job: train a decoder on text, and go on where an earlier run stopped.

A working directory holds one run: `config.json`, `metrics.jsonl`, `loss.png` and
`checkpoints/`. The state of the data travels with each checkpoint, so a run that was
interrupted repeats nothing and skips nothing.
"""

import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import jax
from flax import nnx
from tqdm import tqdm

from jaxspeed.chips import chip_of
from jaxspeed.config import Config, from_json, to_json
from jaxspeed.data import Batch, Batches, Tokenizer, train_batches
from jaxspeed.mesh import make_mesh
from jaxspeed.models import Decoder, DecoderConfig, load_params, read_config
from jaxspeed.models.flops import model_flops
from jaxspeed.train.engine import Engine, initialize
from jaxspeed.train.evaluate import HeldOut, evaluate
from jaxspeed.train.layout import shardings
from jaxspeed.train.record import Metrics, plot_loss, replace_text
from jaxspeed.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        engine, state: to go on with.
        tokenizer: of the run's data.
        held_out: figures on held-out text; None if the run was interrupted, or nothing
            is held out.
        step: the last step taken, of `config.run.steps`.
        interrupted: a signal stopped it before the end; the state is saved.
    """

    engine: Engine
    state: TrainState
    tokenizer: Tokenizer
    held_out: HeldOut | None
    step: int
    interrupted: bool


class Observer(Protocol):
    """Watches a run without changing it, a profiler for instance."""

    def begin(self, engine: Engine, state: TrainState, batch: Batch) -> None:
        """Called once, before the first step of this run, with what it will be given.

        Tracing `engine.step(state, batch)` is allowed, running it is not: that would
        consume the state.
        """
        ...

    def span(self, part: str, step: int) -> AbstractContextManager[Any]:
        """Encloses a part of a step.

        Args:
            part: "data", "step" (hands it to the devices), "metrics" (waits for it),
                "save" or "evaluate".
            step: number of the step, from 1; metrics can be those of the step before.
        """
        ...


class _Unobserved:
    def begin(self, engine: Engine, state: TrainState, batch: Batch) -> None:
        pass

    def span(self, part: str, step: int) -> AbstractContextManager[Any]:
        return nullcontext()


def train(
    config: Config,
    workdir: str,
    say: Callable[[str], None],
    *,
    pretrained: str | None = None,
    observer: Observer | None = None,
) -> Outcome:
    """Runs `config` in `workdir` up to `config.run.steps`, resuming what is there.

    Args:
        config: the run. `checkpoint.directory` is `workdir/checkpoints` if not set.
        workdir: created if missing.
        say: prints a line for the user.
        pretrained: a Hugging Face folder to start from; it sets `config.model` but for
            the layout of sparse attention.
        observer: told about every step of this run.

    Raises:
        ValueError: the directory holds another run, or the configuration does not fit
            the devices or the data.
    """
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if pretrained is not None:
        config = dataclasses.replace(
            config, model=_pretrained_model(config, pretrained)
        )
    as_given = config
    if config.checkpoint.directory is None:
        place = dataclasses.replace(
            config.checkpoint, directory=str(folder / "checkpoints")
        )
        config = dataclasses.replace(config, checkpoint=place)
    tokenizer = config.data.load_tokenizer()
    _check_vocabulary(config, tokenizer)
    mesh = make_mesh(config.mesh)
    config = config.sized_for(mesh)
    engine = initialize(config, lambda rngs: make_decoder(config, rngs), mesh=mesh)

    def look(state: TrainState) -> None:
        _held_out(engine, state, tokenizer, record, say)

    _claim(folder / "config.json", as_given, has_run=bool(engine.steps()))
    batches = train_batches(config.data, config.batch.size)
    state, start = _start(engine, batches, config, pretrained, say)
    record = Metrics(folder / "metrics.jsonl", start) if _leads() else None
    progress = _Progress(engine, record, say, start)
    watch = observer or _Unobserved()
    state, last, interrupted = _steps(engine, state, batches, progress, look, watch)
    _save_newest(engine, state, batches)
    held_out = None
    if not interrupted:
        held_out = _held_out(engine, state, tokenizer, record, say)
    if record:
        record.close()
        plot_loss(folder / "metrics.jsonl", folder / "loss.png")
    batches.close()
    return Outcome(engine, state, tokenizer, held_out, last, interrupted)


def make_decoder(config: Config, rngs: nnx.Rngs) -> Decoder:
    """The model of a run."""
    return Decoder(config.model, rngs=rngs, remat_policy=config.remat)


def _pretrained_model(config: Config, pretrained: str) -> DecoderConfig:
    """The folder's architecture with the run's own layout of sparse attention."""
    model, sparse = read_config(pretrained), config.model.attention.sparse
    attention = dataclasses.replace(model.attention, sparse=sparse)
    return dataclasses.replace(model, attention=attention)


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but "
            f"model.vocab_size={config.model.vocab_size}; set "
            f"--config.model.vocab_size={tokenizer.vocab_size}"
        )


def _claim(path: pathlib.Path, config: Config, *, has_run: bool) -> None:
    """Records the run's configuration; another model must not continue this one."""
    if has_run and path.exists():
        try:
            before = from_json(path.read_text())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if before.model != config.model:
            raise ValueError(
                f"{path.parent} holds a run of another model; give another --workdir, "
                f"remove it, or go on with --config={path}"
            )
    if jax.process_index() == 0:
        replace_text(path, to_json(config))


def _start(
    engine: Engine,
    batches: Batches,
    config: Config,
    pretrained: str | None,
    say: Callable[[str], None],
) -> tuple[TrainState, int]:
    if not engine.steps():
        params = None
        if pretrained is not None:
            places = shardings(engine.layout.optimizer, engine.mesh)
            params = load_params(pretrained, config.model, places)
        return engine.init(jax.random.key(config.run.seed), params), 0
    state, notes = engine.restore()
    if "data" in notes:
        batches.set_state(notes["data"])
    step = int(state.step)
    say(f"resuming after step {step} from {config.checkpoint.directory}")
    return state, step


def _notes(batches: Batches) -> dict[str, Any]:
    return {"data": batches.get_state(), "jax": jax.__version__}


def _steps(
    engine: Engine,
    state: TrainState,
    batches: Batches,
    progress: "_Progress",
    look: Callable[[TrainState], None],
    observer: Observer,
) -> tuple[TrainState, int, bool]:
    """Steps until the end or a signal; metrics are read one step late.

    Reading a step's metrics waits for it, so they are read when the next step is
    already on the device, unless they are there before.
    """
    config = engine.config
    total, save_every = config.run.steps, config.checkpoint.every
    look_every = config.run.evaluate_every
    last, pending, span = progress.start, None, observer.span

    def report(step: int, metrics: dict[str, Any]) -> None:
        with span("metrics", step):
            progress.report(step, metrics)

    with _stop_signal() as stopped, progress:
        for step in range(progress.start + 1, total + 1):
            with span("data", step):
                batch = _next(batches, engine, state)
            if step == progress.start + 1:
                observer.begin(engine, state, batch)
            with span("step", step):
                state, metrics = engine.step(state, batch)
            if pending:
                report(*pending)
            pending, last = (step, metrics), step
            loss: Any = metrics["loss"]
            if loss.is_ready():  # nothing to wait for
                report(*pending)
                pending = None
            if stopped():
                break
            saves = save_every and step % save_every == 0 and step < total
            looks = look_every and step % look_every == 0 and step < total
            if pending and (saves or looks):
                report(*pending)
                pending = None
            if saves:
                with span("save", step):
                    engine.save(state, _notes(batches))
            if looks:
                with span("evaluate", step):
                    look(state)
        if pending:
            report(*pending)
    return state, last, last < total


def _next(batches: Batches, engine: Engine, state: TrainState) -> Batch:
    """The next batch; a damaged file must not cost the steps made so far."""
    try:
        return next(batches)
    except (OSError, ValueError):
        _save_newest(engine, state, batches)
        raise


def _save_newest(engine: Engine, state: TrainState, batches: Batches) -> None:
    """Saves the state unless its step is saved already; returns when committed."""
    engine.wait()
    if int(state.step) > max(engine.steps(), default=-1):
        engine.save(state, _notes(batches))
        engine.wait()


class _Progress:
    """Shows a bar in a terminal, lines elsewhere; writes every step's metrics."""

    def __init__(
        self,
        engine: Engine,
        record: Metrics | None,
        say: Callable[[str], None],
        start: int,
    ) -> None:
        self.start = start
        self._config, self._record, self._say = engine.config, record, say
        config, length = engine.config, engine.config.data.sequence_length
        self._tokens = config.batch.size * length
        self._flops = model_flops(config.model, self._tokens, length)
        chip = chip_of(engine.mesh.devices.flat[0])
        self._peak = chip.bf16_flops * engine.mesh.size if chip else None
        self._before = time.perf_counter()
        self._bar = tqdm(
            total=config.run.steps,
            initial=start,
            unit="step",
            disable=None if _leads() else True,  # None: off unless in a terminal
        )

    def __enter__(self) -> "_Progress":
        self._before = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Waits for the step's metrics, then shows and writes them."""
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        row = {
            "step": step,
            **values,
            "step_seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "model_flops_per_second": self._flops / seconds,
        }
        if self._peak:
            row["mfu"] = self._flops / seconds / self._peak
        if self._record:
            self._record.write(row)
        speed = f"{row['tokens_per_second']:,.0f}"
        if self._bar.disable:
            if step % self._config.run.log_every == 0 or step == self.start + 1:
                total = self._config.run.steps
                loss = row["loss"]
                self._say(f"step {step}/{total}  loss {loss:.3f}  {speed} tokens/s")
        else:
            self._bar.set_postfix(
                {"loss": f"{row['loss']:.3f}", "tokens/s": speed}, refresh=False
            )
            self._bar.update()


def _leads() -> bool:
    return jax.process_index() == 0


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the loop after the current step; a second Ctrl-C, now."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _held_out(
    engine: Engine,
    state: TrainState,
    tokenizer: Tokenizer,
    record: Metrics | None,
    say: Callable[[str], None],
) -> HeldOut | None:
    """Figures on held-out text, also written to the metrics; None if there is none."""
    config = engine.config
    try:
        held_out = evaluate(
            engine,
            state,
            config.data,
            batch_size=config.batch.size,
            num_batches=config.run.evaluate_batches,
            tokenizer=tokenizer,
        )
    except ValueError as error:
        if not str(error).startswith("nothing is held out"):
            raise
        say(f"no held-out loss: {error}")
        return None
    if record:
        record.write(
            {
                "step": int(state.step),
                "held_out_loss": held_out.loss,
                "held_out_bits_per_byte": held_out.bits_per_byte,
            }
        )
    return held_out
