"""Gin files as another way to write a `Config`; needs `pip install jaxspeed[gin]`.

The dataclasses of `Config` are registered with gin from outside and stay as they are.
A binding names the class and the field; the parts are put together here:

    Zero.stage = 3
    Optimizer.learning_rate = 1e-3
    Schedule.kind = 'warmup_linear'
"""

import dataclasses
import functools
import pathlib
import typing
from collections.abc import Callable, Sequence
from typing import Any

from jaxspeed.config import Config, freeze

MODULE = "jaxspeed"


def load(path: str | pathlib.Path, bindings: Sequence[str] = ()) -> Config:
    """The configuration in a gin file.

    Gin's bindings are one set per process: those made before are cleared.

    Args:
        path: the gin file.
        bindings: more of them, which win over the file: `"Zero.stage = 2"`.

    Raises:
        ImportError: gin is not installed.
        FileNotFoundError: no such file.
        TypeError, ValueError: a name that does not exist, or a wrong value.
    """
    gin = _gin()
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no gin file {str(path)!r}")
    configurables = _register()
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings([str(path)], list(bindings))
        config = _build(Config, configurables)
    except SyntaxError as error:
        raise ValueError(f"{path}: not gin: {error}") from error
    finally:
        gin.clear_config()
    return freeze(dataclasses.asdict(config))


def _gin() -> Any:
    try:
        import gin
    except ImportError as error:
        raise ImportError(
            "reading a gin file needs gin: pip install 'jaxspeed[gin]', or write the "
            "configuration in Python (configs/tiny.py)"
        ) from error
    return gin


@functools.cache
def _register() -> dict[type, Callable[..., Any]]:
    """Gin's versions of all dataclasses in `Config`, by class; made once."""
    gin = _gin()
    return {
        each: gin.external_configurable(each, module=MODULE) for each in _parts(Config)
    }


def _parts(cls: type) -> list[type]:
    """Dataclass `cls` and those nested in it, each once."""
    found = [cls]
    for annotation in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(annotation):
            inner = _parts(typing.cast(type, annotation))
            found += [each for each in inner if each not in found]
    return found


def _build(cls: type, configurables: dict[type, Callable[..., Any]]) -> Any:
    """An instance from gin's bindings; parts that no binding gives are built too."""
    parts = {
        name: _build(typing.cast(type, annotation), configurables)
        for name, annotation in typing.get_type_hints(cls).items()
        if dataclasses.is_dataclass(annotation) and not _is_bound(cls, name)
    }
    return configurables[cls](**parts)


def _is_bound(cls: type, name: str) -> bool:
    try:
        _gin().query_parameter(f"{MODULE}.{cls.__name__}.{name}")
    except ValueError:
        return False
    return True
