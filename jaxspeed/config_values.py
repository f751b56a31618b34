"""Plain values and text into frozen dataclasses, checked field by field.

The annotations of a dataclass say what a field takes: bool, int, float, str, tuples,
`Literal`, other dataclasses, and `| None`. A value is never reinterpreted, except that
an int may stand for a float and a list for a tuple. Errors give the path of the field
(`optimizer.schedule.kind`), what was given, and what is allowed.
"""

import ast
import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of dataclass `cls`; what `values` leaves out keeps its default.

    Args:
        cls: a dataclass whose annotations are of the kinds above.
        values: by field name; nested mappings, or instances, for nested dataclasses.
        path: where in the whole configuration this is, for error messages.

    Raises:
        TypeError: a value of another type than its field.
        ValueError: an unknown field, or a value that the dataclass refuses.
    """
    annotations = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore
    converted = {}
    for name, value in values.items():
        place = join(path, name)
        if name not in known:
            raise unknown_field(place, known)
        converted[name] = convert(value, annotations[name], place)
    try:
        return cls(**converted)
    except (TypeError, ValueError) as error:
        if not path or path in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def unknown_field(path: str, known: Iterable[str]) -> ValueError:
    """The error for a field that does not exist, with the nearest that does."""
    parent, _, name = path.rpartition(".")
    near = nearest(name, known)
    return ValueError(
        f"unknown field {path!r}"
        + (f"; did you mean {join(parent, near)!r}?" if near else ";")
        + f" {parent or 'the configuration'} has the fields {', '.join(known)}"
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is spelled most like `name`, if any is at all."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)


def join(path: str, name: str) -> str:
    """The path of field `name` of the record at `path`."""
    return f"{path}.{name}" if path else str(name)


def convert(value: Any, annotation: Any, path: str) -> Any:
    """`value` as a field annotated `annotation` holds it; see `from_mapping`."""
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, Mapping):
            return from_mapping(annotation, value, path)  # pyright: ignore
        if isinstance(value, annotation):  # pyright: ignore
            return value
    elif choices := _alternatives(annotation):
        for choice in choices:
            if _fits(value, choice):
                return convert(value, choice, path)
    elif typing.get_origin(annotation) is Literal:
        if value in typing.get_args(annotation):
            return value
        raise _not_a_choice(value, annotation, path)
    elif typing.get_origin(annotation) is tuple:
        if isinstance(value, (tuple, list)):
            kinds = _element_kinds(annotation, len(value), path, value)
            return tuple(
                convert(element, kind, f"{path}[{index}]")
                for index, (element, kind) in enumerate(zip(value, kinds, strict=True))
            )
    elif _fits(value, annotation):
        return value if annotation is types.NoneType else annotation(value)
    raise TypeError(
        f"{path} is {value!r} ({type(value).__name__}); it must be "
        f"{describe(annotation)}"
    )


def parse(text: str, annotation: Any, path: str) -> Any:
    """The value that `text`, from a command line, stands for in a field.

    `none` is None where the field allows it; tuples are `(1, 2)` or `1,2`.

    Raises:
        TypeError: the text is no value of this type.
        ValueError: the text is none of the field's choices.
    """
    wrong = TypeError(f"{path} is {text!r}; it must be {describe(annotation)}")
    if dataclasses.is_dataclass(annotation):
        names = [field.name for field in dataclasses.fields(annotation)]
        raise TypeError(
            f"{path} is a group of fields; set one of them, such as "
            f"{path}.{names[0]}. It has {', '.join(names)}"
        )
    if choices := _alternatives(annotation):
        if types.NoneType in choices and text.lower() == "none":
            return None
        for choice in choices:
            try:
                return parse(text, choice, path)
            except TypeError:
                continue
        raise wrong
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return convert(text, annotation, path)
    if origin is tuple:
        elements = _split(text)
        kinds = _element_kinds(annotation, len(elements), path, text)
        return tuple(
            parse(element, kind, f"{path}[{index}]")
            for index, (element, kind) in enumerate(zip(elements, kinds, strict=True))
        )
    if annotation is str:
        return text
    if annotation is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise wrong
        return text.lower() in ("true", "1")
    try:
        return annotation(text)
    except (TypeError, ValueError):
        raise wrong from None


def describe(annotation: Any) -> str:
    """What a field takes, in words: `an int or None`."""
    if choices := _alternatives(annotation):
        return " or ".join(describe(choice) for choice in choices)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a tuple, each element {describe(arguments[0])}"
        return f"a tuple of {len(arguments)}, each {describe(arguments[0])}"
    if annotation is types.NoneType:
        return "None"
    if dataclasses.is_dataclass(annotation):
        names = ", ".join(field.name for field in dataclasses.fields(annotation))
        return f"a mapping with some of the fields {names}"
    article = "an" if annotation.__name__[0] in "aeiou" else "a"
    allowed = {bool: " (true or false)", float: " or an int"}.get(annotation, "")
    return f"{article} {annotation.__name__}{allowed}"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or nothing."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return ()


def _fits(value: Any, annotation: Any) -> bool:
    """Whether `value` has the type of `annotation`, whatever its elements."""
    if dataclasses.is_dataclass(annotation):
        return isinstance(value, (Mapping, annotation))  # pyright: ignore
    origin = typing.get_origin(annotation)
    if origin is tuple:
        return isinstance(value, (tuple, list))
    if origin is Literal:
        return isinstance(value, str)
    if isinstance(value, bool) or annotation is bool:
        return isinstance(value, bool) and annotation is bool
    kinds = {int: numbers.Integral, float: numbers.Real}
    return isinstance(value, kinds.get(annotation, annotation))


def _element_kinds(annotation: Any, length: int, path: str, value: Any) -> list[Any]:
    arguments = typing.get_args(annotation)
    if arguments[-1] is Ellipsis:
        return [arguments[0]] * length
    if len(arguments) != length:
        raise TypeError(f"{path} is {value!r}; it must be {describe(annotation)}")
    return list(arguments)


def _not_a_choice(value: Any, annotation: Any, path: str) -> ValueError:
    near = nearest(value, typing.get_args(annotation))
    hint = f"; did you mean {near!r}?" if near else ""
    return ValueError(f"{path} is {value!r}; it must be {describe(annotation)}{hint}")


def _split(text: str) -> list[str]:
    """The elements of a tuple on a command line."""
    text = text.strip()
    if text[:1] in ("(", "["):
        try:
            literal = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            text = text[1:].rstrip(")]")
        else:
            return [str(each) for each in literal]
    return [each.strip() for each in text.split(",") if each.strip()]
