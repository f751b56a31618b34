"""From a ds_config to a `Config`, with a verdict on every key."""

import json
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from jaxspeed.config import Config, freeze
from jaxspeed.config_values import join
from jaxspeed.ds_config.batch import KEYS, translate_batch
from jaxspeed.ds_config.optimizer import translate_optimizer
from jaxspeed.ds_config.reader import read
from jaxspeed.ds_config.schedule import translate_scheduler
from jaxspeed.ds_config.sections import (
    translate_gradients,
    translate_parallelism,
    translate_precision,
    translate_zero,
)
from jaxspeed.ds_config.sparse_attention import translate_sparse_attention
from jaxspeed.ds_config.verdicts import (
    FEATURES,
    IGNORED,
    Translation,
    Verdict,
    flatten,
    is_auto,
    judge_by_table,
)

Source = str | pathlib.Path | Mapping[str, Any]


def translate(source: Source, num_data_shards: int | None = None) -> Translation:
    """Verdicts, fields of `Config` by path, and notes.

    Args:
        source: path of a ds_config.json, or the dict.
        num_data_shards: devices that hold different data; None leaves open what
            depends on it.

    Raises:
        UnknownKeyError: a key that DeepSpeed does not have.
        ValueError: malformed, contradictory, or a value of the wrong type.
    """
    config = read(source)
    given = dict(flatten(config))
    out = Translation()
    for key, value in given.items():
        if key in IGNORED or key in FEATURES:
            judge_by_table(key, value, out)
        elif key == "zero_optimization.stage" and not is_auto(key, value, out):
            judge_by_table(key, value, out)
    translate_batch(given, num_data_shards, out)
    translate_precision(given, out)
    translate_zero(given, num_data_shards, out)
    translate_gradients(given, out)
    translate_optimizer(given, out)
    translate_scheduler(given, out)
    translate_parallelism(given, num_data_shards, out)
    translate_sparse_attention(given, out)
    judged = {verdict.key for verdict in out.verdicts}
    for key, value in given.items():
        if value is None and key not in judged and key not in KEYS:
            out.ignore(key, "not set")
    order = list(_paths(config))
    out.verdicts.sort(key=lambda verdict: order.index(verdict.key))
    return out


def _paths(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """All keys, of every depth, in the order of the file."""
    for name, value in config.items():
        key = join(path, name)
        yield key
        if isinstance(value, Mapping):
            yield from _paths(value, key)


def report(source: Source) -> list[Verdict]:
    """The verdict on every key, in the order of the file; the errors of `translate`."""
    out = translate(source)
    _config(out)
    return out.verdicts


def to_config(source: Source, *, num_data_shards: int) -> Config:
    """The `Config` that does what the ds_config says.

    Args:
        source: path of a ds_config.json, or the dict.
        num_data_shards: devices that the batch is split over (all devices divided by
            those of tensor parallelism).

    Raises:
        ValueError: all keys that are refused, with what to do; and the errors of
            `translate`.
    """
    out = translate(source, num_data_shards)
    refused = [each for each in out.verdicts if each.verdict == "refused"]
    if refused:
        lines = [f"  {each.key}: {each.does}" for each in refused]
        raise ValueError("\n".join([f"refused keys: {len(refused)}", *lines]))
    return _config(out)


def _config(out: Translation) -> Config:
    values: dict[str, Any] = {}
    for field, value in out.fields.items():
        *parents, last = field.split(".")
        place = values
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return freeze(values)


def run(path: str | pathlib.Path, json_output: bool = False) -> int:
    """Prints the verdicts, as `jaxspeed ds-config` does.

    Returns:
        The exit code: 0, or 1 if a key is refused, or 2 if the file cannot be used
        (an unknown key, a wrong value, malformed, missing); that goes to stderr.
    """
    try:
        out = translate(path)
        _config(out)
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if json_output:
        keys = [vars(verdict) for verdict in out.verdicts]
        print(json.dumps({"keys": keys, "notes": out.notes}, indent=2))
    else:
        print(_table(out))
    return int(any(verdict.verdict == "refused" for verdict in out.verdicts))


def _table(out: Translation) -> str:
    width = max((len(verdict.key) for verdict in out.verdicts), default=0)
    indent = " " * (width + 12)
    columns = max(shutil.get_terminal_size((100, 24)).columns, width + 52)
    lines = []
    for each in out.verdicts:
        line = f"{each.key:<{width}}  {each.verdict:<8}  {each.does}"
        lines += textwrap.wrap(line, columns, subsequent_indent=indent)
    counts = [
        f"{sum(each.verdict == name for each in out.verdicts)} {name}"
        for name in ("honoured", "no-op", "refused")
    ]
    notes = [f"note: {note}" for note in out.notes]
    return "\n".join([*lines, "", *notes, ", ".join(counts)])
