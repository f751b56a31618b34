"""A ds_config.json file, or dict, as a plain dict that is known to be well formed."""

import copy
import json
import pathlib
from collections.abc import Mapping
from typing import Any


def read(source: str | pathlib.Path | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as a dict with DeepSpeed's older spellings made current.

    Args:
        source: the path of a JSON file, or the dict itself (it is copied).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON (line and column are named), a key that occurs twice, or
            no object at the top.
    """
    if isinstance(source, Mapping):
        return _current(copy.deepcopy(dict(source)))
    path = pathlib.Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no DeepSpeed configuration {str(path)!r}")
    try:
        config = json.loads(path.read_text(), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; the "
            "file must be plain JSON, without comments or trailing commas"
        ) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not a JSON object")
    return _current(config)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, value in pairs:
        if key in config:
            raise ValueError(
                f"the key {key!r} occurs twice in one object, as {config[key]!r} and "
                f"as {value!r}; keep one of them"
            )
        config[key] = value
    return config


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """The same with `bfloat16` as `bf16`, and a bare `zero_optimization` as a stage."""
    if "bfloat16" in config:
        if "bf16" in config:
            raise ValueError("bf16 and bfloat16 are one key; keep bf16")
        config["bf16"] = config.pop("bfloat16")
    if isinstance(config.get("zero_optimization"), bool):
        config["zero_optimization"] = {"stage": int(config["zero_optimization"])}
    return config
