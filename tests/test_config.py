"""The configuration: thaw and freeze, files, overrides, and what they refuse."""

import dataclasses
import json
import pathlib
import typing

import ml_collections
import numpy as np
import pytest

from jaxspeed.config import (
    Batch,
    Config,
    Run,
    freeze,
    from_json,
    load,
    override,
    thaw,
    to_json,
)
from jaxspeed.config_values import convert, describe, from_mapping, nearest, parse
from jaxspeed.mesh import MeshShape
from jaxspeed.parallel.zero import Zero

ROOT = pathlib.Path(__file__).parent.parent


def every_field(cls, path=""):
    """(path, annotation, default) of all fields, nested ones included."""
    for name, annotation in typing.get_type_hints(cls).items():
        place = f"{path}.{name}" if path else name
        if dataclasses.is_dataclass(annotation):
            yield from every_field(annotation, place)
        else:
            yield place, annotation


def value_at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_has_fewer_than_twelve_fields():
    assert len(dataclasses.fields(Config)) < 12


def test_fields_accept_dicts():
    config = Config(mesh=dict(data=4, tensor=2), zero=dict(stage=3))
    assert config.mesh == MeshShape(data=4, tensor=2)
    assert config.zero == Zero(stage=3)
    nested = Config(optimizer=dict(schedule=dict(kind="constant")))
    assert nested.optimizer.schedule.kind == "constant"


def test_thaw_and_freeze_are_inverse():
    config = Config(zero=Zero(stage=2), batch=Batch(32, 4), run=Run(seed=7))
    thawed = thaw(config)
    assert thawed.optimizer.schedule.kind == config.optimizer.schedule.kind
    assert freeze(thawed) == config


def test_thawed_config_is_locked_at_every_level():
    config = thaw(Config())
    with pytest.raises(AttributeError, match="stag"):
        config.zero.stag = 2
    with pytest.raises(AttributeError, match="zerro"):
        config.zerro = 2


def test_edits_arrive_with_their_types():
    config = thaw(Config())
    config.optimizer.learning_rate = 1
    config.optimizer.betas = [0.5, 0.75]
    config.optimizer.clip_norm = None
    config.model.attention.window_layers = [0, 2]
    config.model.attention.window = np.int64(16)
    frozen = freeze(config)
    assert frozen.optimizer.learning_rate == 1.0
    assert type(frozen.optimizer.learning_rate) is float
    assert frozen.optimizer.betas == (0.5, 0.75)
    assert frozen.optimizer.clip_norm is None
    assert frozen.model.attention.window_layers == (0, 2)
    assert type(frozen.model.attention.window) is int


def test_missing_fields_are_defaults():
    assert freeze(dict(zero=dict(stage=1))) == Config(zero=Zero(stage=1))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            dict(zero=dict(stag=2)),
            ValueError,
            r"unknown field 'zero.stag'; did you mean 'zero.stage'\? zero has the "
            "fields stage, min_size, axes, reduce_dtype",
        ),
        (dict(zerro={}), ValueError, r"'zerro'; did you mean 'zero'\?"),
        (
            dict(zero=dict(xyz=2)),
            ValueError,
            "unknown field 'zero.xyz'; zero has the fields",
        ),
        (
            dict(zero=dict(stage="2")),
            TypeError,
            r"zero.stage is '2' \(str\); it must be an int",
        ),
        (
            dict(zero=dict(stage=2.0)),
            TypeError,
            r"zero.stage is 2.0 \(float\); it must be an int",
        ),
        (dict(zero=dict(stage=True)), TypeError, r"zero.stage is True \(bool\)"),
        (
            dict(data=dict(shuffle=1)),
            TypeError,
            r"data.shuffle is 1 \(int\); it must be a bool",
        ),
        (
            dict(optimizer=dict(learning_rate="1e-3")),
            TypeError,
            r"optimizer.learning_rate is '1e-3' \(str\); it must be a float or an int",
        ),
        (
            dict(optimizer=dict(betas=(0.9, "x"))),
            TypeError,
            r"optimizer.betas\[1\] is 'x' \(str\)",
        ),
        (
            dict(optimizer=dict(betas=(0.9,))),
            TypeError,
            r"optimizer.betas is \(0.9,\); it must be a tuple of 2",
        ),
        (
            dict(optimizer=dict(clip_norm="off")),
            TypeError,
            r"clip_norm is 'off' \(str\); it must be a float or an int or None",
        ),
        (
            dict(optimizer=dict(learning_rate=None)),
            TypeError,
            r"optimizer.learning_rate is None \(NoneType\)",
        ),
        (
            dict(optimizer=dict(schedule=dict(kind="warmup_cosin"))),
            ValueError,
            r"optimizer.schedule.kind is 'warmup_cosin'.*did you mean 'warmup_cosine'",
        ),
        (dict(mesh=4), TypeError, r"mesh is 4 \(int\); it must be a mapping.*tensor"),
        (dict(mesh=dict(data=0)), ValueError, "mesh axis 'data' has size 0"),
        (dict(zero=dict(stage=4)), ValueError, "zero.stage is 4"),
        (dict(data=dict(source="web")), ValueError, r"data: .*'web'"),
        (dict(remat="some"), ValueError, "remat is 'some'; choose one of.*full"),
        (dict(batch=dict(size=0)), ValueError, "batch.size is 0; at least 1"),
        (dict(run=dict(steps=0)), ValueError, "run.steps is 0; at least 1"),
        (
            dict(batch=dict(size=6, accumulation=4)),
            ValueError,
            "batch.size=6 is not a multiple of batch.accumulation=4",
        ),
    ],
)
def test_freeze_refuses(values, error, message):
    with pytest.raises(error, match=message):
        freeze(values)


def test_config_itself_checks_its_fields():
    with pytest.raises(ValueError, match=r"'mesh.dat'; did you mean 'mesh.data'\?"):
        Config(mesh=dict(dat=4))
    with pytest.raises(TypeError, match=r"zero is 3 \(int\)"):
        Config(zero=3)


def test_json_keeps_everything():
    config = Config(mesh=MeshShape(data=2, seq=4), optimizer=dict(clip_norm=None))
    text = to_json(config)
    assert json.loads(text)["mesh"]["seq"] == 4
    assert from_json(text) == config


def test_json_refused():
    with pytest.raises(ValueError, match=r"not JSON.*line 2, column 1"):
        from_json('{"zero":\n')
    with pytest.raises(ValueError, match="a configuration is a JSON object"):
        from_json("[]")


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("--config.zero.stage=2", "zero.stage", 2),
        ("--config.optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("--config.optimizer.clip_norm=none", "optimizer.clip_norm", None),
        ("--config.optimizer.clip_norm=0.5", "optimizer.clip_norm", 0.5),
        ("--config.optimizer.betas=0.8,0.9", "optimizer.betas", (0.8, 0.9)),
        ("--config.optimizer.betas=(0.8, 0.9)", "optimizer.betas", (0.8, 0.9)),
        ("--config.optimizer.name=lion", "optimizer.name", "lion"),
        ("--config.data.shuffle=False", "data.shuffle", False),
        ("--config.zero.axes=data", "zero.axes", ("data",)),
        ("--config.zero.axes=('data','seq')", "zero.axes", ("data", "seq")),
        ("--config.zero.axes=[data,seq]", "zero.axes", ("data", "seq")),
        ("--config.zero.axes=", "zero.axes", ()),
        ("--config.data.tokenizer=a=b", "data.tokenizer", "a=b"),
        ("--config.remat=none", "remat", "none"),
    ],
)
def test_override(argument, path, value):
    changed = value_at(override(Config(), [argument]), path)
    assert changed == value and type(changed) is type(value)


def test_overrides_are_checked_together():
    """Neither order of the two is valid on its own half-way."""
    arguments = ["--config.mesh.data=2", "--config.mesh.tensor", "-1"]
    assert override(Config(), arguments).mesh == MeshShape(data=2, tensor=-1)
    assert override(Config(), arguments[1:] + arguments[:1]).mesh.tensor == -1


def test_every_field_survives_its_own_text():
    """Each field's default, printed and parsed again, leaves the config as it was."""
    config = Config()
    for path, _ in every_field(Config):
        value = value_at(config, path)
        assert override(config, [f"--config.{path}={value}"]) == config, path


def test_every_annotation_is_of_a_kind_that_is_checked():
    for path, annotation in every_field(Config):
        assert describe(annotation), path
        assert convert(value_at(Config(), path), annotation, path) == value_at(
            Config(), path
        )
        with pytest.raises((TypeError, ValueError), match=path.replace(".", r"\.")):
            convert(object(), annotation, path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["--config.zero.stage=two"],
            TypeError,
            "zero.stage is 'two'; it must be an int",
        ),
        (["--config.zero.stage=1.5"], TypeError, "zero.stage is '1.5'"),
        (["--config.data.shuffle=maybe"], TypeError, "bool .true or false"),
        (["--config.zero.stag=2"], ValueError, r"did you mean 'zero.stage'\?"),
        (["--config.zero.stage.x=2"], ValueError, "'zero.stage' has no fields"),
        (["--config.mesh=4"], TypeError, "mesh is a group of fields.*mesh.pipe"),
        (["--config.zero.stage"], ValueError, "--config.zero.stage has no value"),
        (["--zero.stage=2"], ValueError, "cannot read '--zero.stage'"),
        (["config.zero.stage=2"], ValueError, "write --config.zero.stage=2"),
        (["--config.optimizer.betas=1"], TypeError, "betas is '1'; .*tuple of 2"),
        (["--config.optimizer.clip_norm=no"], TypeError, "a float or an int or None"),
        (["--config.optimizer.name=adan"], ValueError, "did you mean 'adam'"),
    ],
)
def test_override_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        override(Config(), arguments)


def write(tmp_path, text, name="run.py"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_load_accepts_config_dict_config_and_json(tmp_path):
    header = "from jaxspeed.config import *\ndef get_config():\n"
    thawed = "  c = thaw(Config())\n  c.zero.stage = 3\n  return c\n"
    expected = Config(zero=Zero(stage=3))
    assert load(write(tmp_path, header + thawed)) == expected
    plain = "  return Config(zero=dict(stage=3))\n"
    assert load(write(tmp_path, header + plain)) == expected
    assert load(write(tmp_path, to_json(expected), "config.json")) == expected


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("x = = 1", ValueError, "run.py, line 2: invalid syntax"),
        ("x = 1", ValueError, "defines no function get_config"),
        ("get_config = lambda: 3", TypeError, "returned a int"),
        (
            "def get_config():\n  c = thaw(Config())\n  c.zero.stag = 1\n  return c",
            ValueError,
            r"run.py, line 4: .*stag",
        ),
        (
            "def get_config():\n  c = thaw(Config())\n  c.zero.stage = '1'\n  return c",
            TypeError,
            r"run.py: zero.stage is '1' \(str\)",
        ),
    ],
)
def test_load_refuses(tmp_path, body, error, message):
    path = write(tmp_path, "from jaxspeed.config import Config, thaw\n" + body)
    with pytest.raises(error, match=message):
        load(path)


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config file.*absent.py"):
        load(tmp_path / "absent.py")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=str)
def test_example_configs_load_and_say_how_to_run_them(path):
    assert isinstance(load(path), Config)
    assert f"--config=configs/{path.name}" in path.read_text()


def test_works_as_an_ml_collections_config_file():
    """`get_config` results are ordinary ConfigDicts."""
    config = thaw(Config())
    assert isinstance(config, ml_collections.ConfigDict)
    assert isinstance(config.optimizer.schedule, ml_collections.ConfigDict)


@dataclasses.dataclass(frozen=True)
class Point:
    x: int = 0
    names: tuple[str, ...] = ()
    either: int | str | None = None


def test_values_convert_by_annotation():
    point = from_mapping(Point, dict(x=2, names=["a"], either="b"))
    assert point == Point(2, ("a",), "b")
    assert parse("3", int | str | None, "either") == 3
    assert parse("three", int | str | None, "either") == "three"
    assert nearest("nmes", ["x", "names"]) == "names"
    assert nearest("qqq", ["x", "names"]) is None
