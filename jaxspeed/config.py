"""The whole configuration of a run: one frozen dataclass of frozen dataclasses.

Each part is declared beside the code that it configures and nothing below this file
sees the whole. A config file edits a `ConfigDict`, which can be overridden field by
field from a command line; `freeze` checks every name and type and turns it back:

    def get_config():
        config = js.config.thaw(js.Config())
        config.zero.stage = 3
        return config
"""

import dataclasses
import json
import math
import pathlib
import runpy
import traceback
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxspeed.checkpoint import Checkpoint
from jaxspeed.config_values import (
    convert,
    from_mapping,
    join,
    parse,
    unknown_field,
)
from jaxspeed.data import Data
from jaxspeed.mesh import BATCH_AXES, MeshShape
from jaxspeed.models.remat import POLICIES
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.optim import Optimizer, Precision
from jaxspeed.parallel.zero import Zero


@dataclasses.dataclass(frozen=True)
class Batch:
    """How many sequences make one optimizer step.

    Attributes:
        size: sequences on all devices together.
        accumulation: micro-batches, one after another, that a step is made of.
        per_device: sequences of one micro-batch on each device that has samples of its
            own; it replaces `size`, so that a configuration fits any number of devices.
    """

    size: int = 8
    accumulation: int = 1
    per_device: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "accumulation", "per_device"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"batch.{name} is {value}; at least 1")
        if self.per_device is None and self.size % self.accumulation:
            raise ValueError(
                f"batch.size={self.size} is not a multiple of "
                f"batch.accumulation={self.accumulation}; micro-batches are of one size"
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """How long to train and how often to look.

    Attributes:
        steps: optimizer steps in the run; schedules end with it.
        seed: of parameters and of all randomness in training; `data.seed` orders data.
        log_every: steps between printed lines where there is no terminal to show a
            bar in; every step is in `metrics.jsonl`.
        evaluate_every: steps between evaluations on held-out data; 0 is never.
        evaluate_batches: batches in an evaluation.
    """

    steps: int = 200
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    evaluate_batches: int = 8

    def __post_init__(self) -> None:
        least = dict(steps=1, seed=0, log_every=1, evaluate_every=0, evaluate_batches=1)
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(
                    f"run.{name} is {getattr(self, name)}; at least {smallest}"
                )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything about a run. A field also takes a dict: `Config(mesh=dict(data=4))`.

    Attributes:
        model: the decoder, for commands that build it; a model of your own ignores it.
        mesh: sizes of the mesh axes.
        zero: what ZeRO splits.
        precision: dtype of the computation, and loss scaling.
        optimizer: the update rule, its schedule and clipping.
        batch: sequences per step.
        data: where tokens come from.
        checkpoint: where and how the state is saved.
        run: number of steps, seed, logging.
        remat: which activations the decoder keeps, a name in `models.remat`.
    """

    model: DecoderConfig = DecoderConfig()
    mesh: MeshShape = MeshShape()
    zero: Zero = Zero()
    precision: Precision = Precision()
    optimizer: Optimizer = Optimizer()
    batch: Batch = Batch()
    data: Data = Data()
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()
    remat: str = "full"

    def __post_init__(self) -> None:
        for name, annotation in typing.get_type_hints(Config).items():
            value = convert(getattr(self, name), annotation, name)
            object.__setattr__(self, name, value)
        if self.remat not in POLICIES:
            raise ValueError(f"remat is {self.remat!r}; choose one of {list(POLICIES)}")

    def sized_for(self, mesh: Mesh) -> "Config":
        """The same with `batch.size` written out where `batch.per_device` sets it."""
        batch = self.batch
        if batch.per_device is None:
            return self
        shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        size = batch.per_device * batch.accumulation * shards
        return dataclasses.replace(
            self, batch=Batch(size=size, accumulation=batch.accumulation)
        )


def thaw(config: Config) -> ConfigDict:
    """A nested, locked `ConfigDict` to edit: fields can be set, none can be added.

    Types are not checked here but all at once by `freeze`, which names the field.
    """
    return ConfigDict(dataclasses.asdict(config), type_safe=False).lock()


def freeze(values: ConfigDict | Mapping[str, Any]) -> Config:
    """The `Config` for a `ConfigDict` or nested mapping; missing fields are defaults.

    Raises:
        TypeError: a value of the wrong type. An int is taken for a float and a list
            for a tuple, nothing else for anything else.
        ValueError: an unknown field, or a value that is not allowed.
    """
    plain = values.to_dict() if isinstance(values, ConfigDict) else values
    return from_mapping(Config, plain)


def load(path: str | pathlib.Path) -> Config:
    """The configuration in a Python file with `get_config()`, or in a JSON file.

    `get_config` returns a `ConfigDict` made by `thaw`, or a `Config`.

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: the file sets a field wrongly, or has no `get_config`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file {str(path)!r}")
    if path.suffix == ".json":
        return from_json(path.read_text())
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    if not callable(get_config):
        raise ValueError(
            f"{path} defines no function get_config(); it must return a Config, or the "
            "ConfigDict that jaxspeed.config.thaw makes of one"
        )
    try:
        config = get_config()
        if isinstance(config, (ConfigDict, Mapping)):
            config = freeze(config)
    except (AttributeError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else f"{path}"
        kind = ValueError if isinstance(error, AttributeError) else type(error)
        raise kind(f"{where}: {error}") from error
    if not isinstance(config, Config):
        raise TypeError(
            f"get_config() in {path} returned a {type(config).__name__}; it must "
            "return a Config or a ConfigDict"
        )
    return config


def override(config: Config, arguments: Sequence[str]) -> Config:
    """`config` with fields replaced from a command line.

    Args:
        config: the configuration to start from.
        arguments: `--config.zero.stage=2`, or the name and the value as two strings.
            Text is read as the type of the field; `none` is None, tuples are `1,2`.

    Raises:
        TypeError: text that is no value of the field's type.
        ValueError: an unknown field, a value that is not allowed, or an argument of
            another form.
    """
    values = dataclasses.asdict(config)
    rest = list(arguments)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        prefix, _, path = name.lstrip("-").partition(".")
        if not name.startswith("-") or prefix != "config" or not path:
            raise ValueError(
                f"cannot read {name!r}; to change a field of the configuration write "
                "--config.zero.stage=2"
            )
        if not equals and not rest:
            raise ValueError(f"{name} has no value; write {name}=VALUE")
        _set(values, path, text if equals else rest.pop(0))
    return freeze(values)


def _set(values: dict[str, Any], path: str, text: str) -> None:
    """Parses `text` as the type of the field at `path` and puts it into `values`."""
    annotation: Any = Config
    *parents, last = path.split(".")
    reached = ""
    for name in [*parents, last]:
        if not dataclasses.is_dataclass(annotation):
            raise ValueError(f"unknown field {path!r}: {reached!r} has no fields")
        known = [field.name for field in dataclasses.fields(annotation)]
        if name not in known:
            raise unknown_field(join(reached, name), known)
        annotation = typing.get_type_hints(annotation)[name]
        reached = join(reached, name)
    for name in parents:
        values = values[name]
    values[last] = parse(text, annotation, path)


def to_json(config: Config) -> str:
    """The whole configuration as JSON text, every field written out."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The configuration that `to_json` wrote; the errors are those of `freeze`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"a configuration is a JSON object, not {type(values)}")
    return freeze(values)
