"""What a family of models is, and how values are read from its `config.json`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxspeed.models.hugging_face.layout import Stored
from jaxspeed.models.transformer import DecoderConfig

Json = dict[str, Any]
T = TypeVar("T", int, float, bool, str)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Names in config.json -> names in `layers.ACTIVATIONS`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        architecture: the class in `transformers`.
        read: config.json -> DecoderConfig; absent keys have the defaults that
            `transformers` gives them.
        write: DecoderConfig -> config.json. It may lose what the family does not
            have; reading back shows that.
        prefix: start of the tensor names, which files of bare models leave out.
        tensors: where each parameter lies, by its path in the decoder.
        aliases: other names that `transformers` takes for a key.
    """

    architecture: str
    read: Callable[[Json], DecoderConfig]
    write: Callable[[DecoderConfig], Json]
    prefix: str
    tensors: Mapping[str, Stored]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read(
    raw: Json, key: str, kind: type[T], default: T | None = None, *, least: int = 1
) -> T:
    """The value of `key`, where null counts as absent.

    Raises:
        ValueError: it is absent and has no default, or of another type, or an integer
            below `least`.
    """
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{key} is missing; a {raw.get('model_type')} model needs it")
    if kind is float and type(value) is int:
        value = kind(value)
    if type(value) is not kind:
        raise ValueError(f"{key} is {value!r}; it must be of type {kind.__name__}")
    if isinstance(value, int) and kind is int and value < least:
        raise ValueError(f"{key} is {value}; it must be at least {least}")
    return value


def refuse_other(key: str, value: Any, supported: Any) -> None:
    """Raises ValueError if `key` has any value but the supported one."""
    if value is not None and value != supported:
        raise ValueError(f"{key} is {value!r}; only {supported!r} is supported")


def read_activation(raw: Json, key: str, default: str) -> str:
    """Our name of an activation function."""
    name = read(raw, key, str, default)
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} is {name!r}; supported are {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_name(ours: str) -> str:
    """The name that `transformers` has for our activation function."""
    return {"gelu_tanh": "gelu_new"}.get(ours, ours)
