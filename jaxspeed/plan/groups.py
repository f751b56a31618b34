"""Which devices talk to each other: replica groups, and the mesh axes they span.

XLA writes the groups of a collective in three forms: as lists, `{{0,1},{2,3}}`; as a
reshaped and transposed range, `[4,2]<=[2,4]T(1,0)`; and as axes of a mesh of its own,
`mesh['axis_0'=2,'axis_1'=4] {'axis_1'}`. All number devices by their position in the
program's device assignment, which for `jax.jit` is `mesh.devices.flat`.
"""

import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from jaxspeed.plan import hlo

Groups = tuple[tuple[int, ...], ...]

IRREGULAR = "irregular"
"""Stands for the axes of groups that differ in the axes they span."""

_NUMBERS = r"\[([\d,]+)\]"
_PERMUTATION = r"(?:T\(([\d,]+)\))?"
_LISTS = re.compile(r"replica_groups=(\{(?:\{[\d,]*\},?)*\})")
_RANGE = re.compile(rf"replica_groups={_NUMBERS}<={_NUMBERS}{_PERMUTATION}")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    rf"(?:, device_ids=\((?:{_NUMBERS}{_PERMUTATION}|([\d,]+))\))? \{{([^}}]*)\}}"
)
_PAIRS = re.compile(r'source_target_pairs="?\{((?:\{\d+,\d+\},? ?)*)\}')


def replica_groups(instruction: hlo.Instruction, num_devices: int) -> Groups:
    """The groups of a collective that has replica groups.

    Raises:
        ValueError: the groups are written in a form that is not known.
    """
    text = instruction.attributes
    if match := _LISTS.search(text):
        groups = tuple(
            _integers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])
        )
    elif match := _RANGE.search(text):
        groups = _rows(_range(match[2], match[3]).reshape(_integers(match[1])))
    elif match := _MESH.search(text):
        groups = _mesh_groups(match)
    else:
        raise ValueError(
            f"cannot read the replica groups of {instruction.opcode} "
            f"{instruction.name!r}: {text[:200]!r}; known are {{{{0,1}},{{2,3}}}}, "
            "[2,2]<=[4] and mesh['x'=2,'y'=2] {'x'}"
        )
    # Groups of replicas, not of devices, mean every partition of those replicas.
    of_replicas = "channel_id=" in text and "use_global_device_ids=true" not in text
    if not groups or (of_replicas and groups == ((0,),)):
        return (tuple(range(num_devices)),)
    return groups


def source_target_pairs(instruction: hlo.Instruction) -> Groups:
    """The pairs (source, target) of a permutation.

    Raises:
        ValueError: it has none, or they are written in a form that is not known.
    """
    match = _PAIRS.search(instruction.attributes)
    if match is None:
        raise ValueError(
            f"cannot read the source_target_pairs of {instruction.opcode} "
            f"{instruction.name!r}: {instruction.attributes[:200]!r}; known is "
            "{{0,1},{1,0}}"
        )
    return _pairs(match[1])


# Programs for hundreds of devices repeat few lists of pairs in thousands of permutes.
@functools.lru_cache(maxsize=1024)
def _pairs(text: str) -> Groups:
    return tuple(_integers(pair) for pair in re.findall(r"\{([\d,]+)\}", text))


def spanned_axes(
    groups: Groups, axis_names: Sequence[str], axis_sizes: Sequence[int]
) -> tuple[str, ...]:
    """The mesh axes along which the members of each group differ, in mesh order.

    Returns:
        `(IRREGULAR,)` if the groups do not agree.
    """
    spans = {_span(group, axis_sizes) for group in groups}
    if len(spans) != 1:
        return (IRREGULAR,)
    return _named(spans.pop(), axis_names)


def shifted_axes(
    pairs: Groups, axis_names: Sequence[str], axis_sizes: Sequence[int]
) -> tuple[str, ...]:
    """The mesh axes along which any source differs from its target, in mesh order."""
    return _named(_shift(pairs, tuple(axis_sizes)), axis_names)


def _span(group: tuple[int, ...], axis_sizes: Sequence[int]) -> tuple[bool, ...]:
    coordinates = np.unravel_index(np.asarray(group), tuple(axis_sizes))
    return tuple(bool((along != along[0]).any()) for along in coordinates)


@functools.lru_cache(maxsize=1024)
def _shift(pairs: Groups, axis_sizes: tuple[int, ...]) -> tuple[bool, ...]:
    sources, targets = np.asarray(pairs, int).reshape(-1, 2).T
    return tuple(
        bool((source != target).any())
        for source, target in zip(
            np.unravel_index(sources, axis_sizes),
            np.unravel_index(targets, axis_sizes),
            strict=True,
        )
    )


def _named(differs: tuple[bool, ...], axis_names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name, each in zip(axis_names, differs, strict=True) if each)


def _mesh_groups(match: re.Match[str]) -> Groups:
    """Groups given as axes, or parts of axes, of a mesh that the compiler made up.

    `'x':(2)4` is the part of size 4 of axis x that follows a part of size 2.
    """
    axes, dims, permutation, listed, grouped = match.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", axes)}
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, before, size in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", grouped):
        parts[name].append((int(before or 1), int(size or sizes[name])))
    if listed:
        devices = np.array(_integers(listed))
    else:
        devices = _range(dims or str(math.prod(sizes.values())), permutation)
    shape, inside = [], []
    for name, size in sizes.items():
        done = 1
        for before, part in sorted(parts[name]):
            inside.append(len(shape) + 1)
            shape += [before // done, part]
            done = before * part
        shape.append(size // done)
    outside = [dim for dim in range(len(shape)) if dim not in inside]
    group_size = math.prod(shape[dim] for dim in inside)
    devices = devices.reshape(shape).transpose(outside + inside)
    return _rows(devices.reshape(-1, group_size))


def _range(dims: str, permutation: str | None) -> np.ndarray:
    """Device numbers 0, 1, ... reshaped to `dims`, then transposed; flat."""
    sizes = _integers(dims)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    if permutation:
        numbers = numbers.transpose(_integers(permutation))
    return numbers.reshape(-1)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in array.tolist())
