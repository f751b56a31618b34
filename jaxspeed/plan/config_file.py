"""A configuration written out as a config file that `jaxspeed train` takes."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxspeed.config import Config, to_json

_PYTHON = '''"""{description}
"""

from ml_collections import ConfigDict

from jaxspeed.config import Config, thaw


def get_config() -> ConfigDict:
    """What differs from the defaults."""
    config = thaw(Config())
{assignments}
    return config
'''


def write_config(config: Config, path: str | pathlib.Path, description: str) -> None:
    """Writes `config` to `path`; the file stands alone.

    Args:
        config: the configuration.
        path: a `.py` file gets what differs from the defaults and `description` as its
            docstring, a `.json` file all fields.
        description: text of one or more lines.

    Raises:
        ValueError: another kind of file.
        OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix == ".json":
        path.write_text(to_json(config))
    elif path.suffix == ".py":
        path.write_text(python_source(config, description))
    else:
        raise ValueError(
            f"cannot write a config to {str(path)!r}: name it .py or .json"
        )


def python_source(config: Config, description: str) -> str:
    """The text of a Python config file, with what differs from the defaults."""
    default, values = dataclasses.asdict(Config()), dataclasses.asdict(config)
    changed = _differences(default, values)
    lines = [f"    config.{name} = {value!r}" for name, value in changed]
    escaped = description.strip().replace("\\", "\\\\").replace('"""', r"\"\"\"")
    return _PYTHON.format(description=escaped, assignments="\n".join(lines))


def _differences(
    default: Mapping[str, Any], values: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        place = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from _differences(default[name], value, place)
        elif value != default[name]:
            yield place, value
