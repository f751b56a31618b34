"""Gin files give the same configuration, and leave the dataclasses alone."""

import pathlib
import sys

import pytest

from jaxspeed import gin_config
from jaxspeed.config import Config, Run, load
from jaxspeed.parallel.zero import Zero

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def write(tmp_path, text):
    path = tmp_path / "run.gin"
    path.write_text(text)
    return path


def test_tiny_is_the_same_run_in_gin_and_python():
    config = gin_config.load(CONFIGS / "gin" / "tiny.gin")
    assert config == load(CONFIGS / "tiny.py")


def test_bindings_set_fields_at_any_depth(tmp_path):
    text = "Zero.stage = 2\nSchedule.kind = 'constant'\nConfig.remat = 'none'\n"
    config = gin_config.load(write(tmp_path, text), ["Zero.stage = 1"])
    assert config.zero == Zero(stage=1) and type(config.zero) is Zero
    assert config.optimizer.schedule.kind == "constant"
    assert config.remat == "none"


def test_a_part_may_be_bound_as_a_reference(tmp_path):
    text = "Config.run = @long/Run()\nlong/Run.steps = 5000\n"
    assert gin_config.load(write(tmp_path, text)).run == Run(steps=5000)


def test_loads_do_not_mix_and_classes_stay_as_they_are(tmp_path):
    gin_config.load(write(tmp_path, "Zero.stage = 3"))
    assert gin_config.load(write(tmp_path, "")) == Config()
    assert Zero().stage == 0


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("Zero.stag = 1", ValueError, "'Zero' doesn't have a parameter named 'stag'"),
        ("Zerro.stage = 1", ValueError, "No configurable matching 'Zerro'"),
        ("Zero.stage = 7", ValueError, "zero.stage is 7"),
        ("Run.steps = 1.5", TypeError, r"run.steps is 1.5 \(float\)"),
        ("Run.steps = = 1", ValueError, "run.gin: not gin"),
    ],
)
def test_refused(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        gin_config.load(write(tmp_path, text))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no gin file"):
        gin_config.load(tmp_path / "absent.gin")


def test_says_what_to_install_without_gin(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gin", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxspeed\[gin\]'"):
        gin_config.load(write(tmp_path, ""))
