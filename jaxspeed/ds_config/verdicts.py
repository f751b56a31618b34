"""What happens to each key: the table in keys.json, and the record of a translation.

Keys are paths with dots, `zero_optimization.stage`. A block such as `wandb` whose keys
make sense only together has one verdict.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from jaxspeed.config_values import join, nearest

_TABLE = json.loads(pathlib.Path(__file__).with_name("keys.json").read_text())
IGNORED = {key: group["does"] for group in _TABLE["ignored"] for key in group["keys"]}
"""Keys that change nothing, with the reason."""
FEATURES: dict[str, Any] = _TABLE["features"]
"""What is refused when switched on: its switch, values that mean off, its keys."""
SETS: dict[str, Any] = _TABLE["sets"]
"""Keys whose value goes into one field of `Config` as it is."""
AUTO: dict[str, str] = _TABLE["auto"]
"""What to write instead of "auto"."""
KNOWN = {*IGNORED, *FEATURES, *SETS, *_TABLE["translated"]}


class UnknownKeyError(ValueError):
    """A key that DeepSpeed does not have."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What becomes of one key.

    Attributes:
        key: its path in the file.
        verdict: "honoured" changes the resulting `Config` (or asks for what is so
            anyway), "no-op" changes nothing, "refused" stops `to_config`.
        does: what it sets, or the reason, or what to do.
    """

    key: str
    verdict: Literal["honoured", "no-op", "refused"]
    does: str


@dataclasses.dataclass(frozen=True)
class Translation:
    """What the parts of the adapter add to as they go through the keys.

    Attributes:
        verdicts: one per key.
        fields: value of a field of `Config` by its path.
        notes: what else the user should know.
    """

    verdicts: list[Verdict] = dataclasses.field(default_factory=list)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def set(self, key: str, field: str, value: Any) -> None:
        """Key `key` sets a field of `Config`."""
        self.fields[field] = value
        self.honour(key, f"{field} = {value!r}")

    def honour(self, key: str, does: str) -> None:
        """Key `key` is taken into account."""
        self.verdicts.append(Verdict(key, "honoured", does))

    def ignore(self, key: str, why: str) -> None:
        """Key `key` changes nothing."""
        self.verdicts.append(Verdict(key, "no-op", why))

    def refuse(self, key: str, why: str) -> None:
        """Key `key` cannot be followed."""
        self.verdicts.append(Verdict(key, "refused", why))


def flatten(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of `config` that have a verdict of their own, with their values.

    Raises:
        UnknownKeyError: a key that is not in the table; the nearest is named.
        ValueError: a block that is no JSON object.
    """
    for name, value in config.items():
        key = join(path, name)
        inner = [known for known in KNOWN if known.startswith(f"{key}.")]
        if key in KNOWN:
            yield key, value
        elif not inner:
            raise unknown_key(key, _names_below(path))
        elif isinstance(value, Mapping) and value:
            yield from flatten(value, key)
        elif value is None or value == {}:
            yield key, None
        else:
            raise ValueError(
                f"{key} is {value!r}; it must be an object with some of the keys "
                f"{', '.join(_names_below(key))}"
            )


def unknown_key(key: str, siblings: list[str]) -> UnknownKeyError:
    """The error for `key`, with the nearest name beside it, or its place elsewhere."""
    parent, _, name = key.rpartition(".")
    near = nearest(name, siblings)
    if near is not None:
        return UnknownKeyError(
            f"unknown key {key!r}; did you mean {join(parent, near)!r}?"
        )
    elsewhere = sorted(known for known in KNOWN if known.rpartition(".")[2] == name)
    if elsewhere:
        return UnknownKeyError(f"unknown key {key!r}; did you mean {elsewhere[0]!r}?")
    return UnknownKeyError(
        f"unknown key {key!r}; {parent or 'the top level'} has the keys "
        f"{', '.join(siblings)}"
    )


def _names_below(path: str) -> list[str]:
    start = f"{path}." if path else ""
    below = [key.removeprefix(start) for key in KNOWN if key.startswith(start)]
    return sorted({name.partition(".")[0] for name in below})


def judge_by_table(key: str, value: Any, out: Translation) -> None:
    """The verdict on a key of the table that needs no other key to be understood."""
    if key in IGNORED:
        out.ignore(key, IGNORED[key])
    elif key in FEATURES:
        if _is_on(key, value):
            out.refuse(key, FEATURES[key]["does"])
        else:
            out.honour(key, "off, as it is here")
    elif key in SETS:
        entry = SETS[key]
        out.set(key, entry["field"], _READERS[entry["type"]](key, value))


def _is_on(key: str, value: Any) -> bool:
    """Whether the feature of block or key `key` is switched on."""
    feature = FEATURES[key]
    off = [None, *feature.get("off", [False])]
    switch = feature.get("switch")
    if value in off or switch is None:
        return value not in off
    if switch == "always":
        return True
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} is {value!r}; it must be an object")
    for name in value:
        if name not in feature.get("keys", value):
            raise unknown_key(join(key, name), feature["keys"])
    if switch == "any enabled":
        return _any_enabled(value)
    return value.get(switch) not in off


def _any_enabled(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return value.get("enabled") is True or any(map(_any_enabled, value.values()))


def is_auto(key: str, value: Any, out: Translation) -> bool:
    """Refuses a value of "auto", which only transformers' Trainer can fill in."""
    if value != "auto":
        return False
    hint = AUTO.get(key, "the value that transformers' Trainer would have put here")
    out.refuse(key, f'"auto" cannot be resolved here; write {hint}')
    return True


def integer(key: str, value: Any) -> int:
    """`value` as an int; JSON's 1e5 is one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} is {value!r}; it must be a whole number")
    return value


def number(key: str, value: Any) -> float:
    """`value` as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} is {value!r}; it must be one number")
    return float(value)


def boolean(key: str, value: Any) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; it must be true or false")
    return value


_READERS = {"integer": integer, "number": number, "boolean": boolean}
