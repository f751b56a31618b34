"""Walks a jaxpr: calls entered, loops multiplied, every equation under its scope."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jax.extend import core

from jaxspeed.profiler.operations import (
    FUSIBLE,
    UNKNOWN,
    Figures,
    arithmetic,
    bytes_moved,
    size_in_bytes,
)
from jaxspeed.profiler.scopes import Scope, scope_of

Found = Callable[[Scope, Figures], None]
"""Receives the work of one equation."""
Note = Callable[[str], None]
"""Receives what could not be counted."""


@dataclasses.dataclass(eq=False)
class _Value:
    """An array of the program, the same through calls; compared by identity."""

    bytes: int
    in_memory: bool = False
    at_hand: bool = False
    """A fusion has made it, or has read it."""


@dataclasses.dataclass(frozen=True)
class _Operation:
    equation: Any
    scope: Scope
    operands: list[_Value]
    results: list[_Value]


def walk(jaxpr: Any, found: Found, note: Note) -> None:
    """Reports the work of a jaxpr, equation by equation.

    Calls (jit, custom derivatives, recomputation) are entered. The body of a scan
    counts `length` times, the body of `shard_map` once per device that runs it. Of a
    conditional the branch with the most FLOPs counts. A `while` counts as one iteration
    and is noted, since a jaxpr does not tell how often it runs. A Pallas kernel is
    what its `cost_estimate` says; without one its FLOPs are noted as unknown.

    Bytes are those of a program whose elementwise operations are fused: they read what
    other operations left in memory (once) and write what other operations read.

    Args:
        jaxpr: a `ClosedJaxpr`.
        found: called with scope and work.
        note: called with what could not be counted.
    """
    _walk(jaxpr, Scope(), 1, found, note)


def _walk(jaxpr: Any, scope: Scope, times: int, found: Found, note: Note) -> None:
    jaxpr = _open(jaxpr)
    arguments = [_Value(size_in_bytes(v.aval), True) for v in jaxpr.invars]
    operations: list[_Operation] = []
    for value in _inline(jaxpr, arguments, scope, operations):
        value.in_memory = True
    for each in operations:
        if each.equation.primitive.name in FUSIBLE:
            for value in each.results:
                value.at_hand = True
        else:
            for value in (*each.operands, *each.results):
                value.in_memory = True
    for each in operations:
        _operation(each, times, found, note)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _inline(
    jaxpr: Any, arguments: list[_Value], scope: Scope, into: list[_Operation]
) -> list[_Value]:
    """Appends the operations of `jaxpr` and of what it calls; returns its results."""
    values = dict(zip(jaxpr.invars, arguments, strict=True))
    for constant in jaxpr.constvars:
        values[constant] = _Value(size_in_bytes(constant.aval), True)

    def value_of(atom: Any) -> _Value:
        return _Value(0) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        place = scope / scope_of(equation)
        operands = [value_of(atom) for atom in equation.invars]
        called = _called(equation)
        if called is None:
            results = [_Value(size_in_bytes(v.aval)) for v in equation.outvars]
            into.append(_Operation(equation, place, operands, results))
        else:
            results = _inline(called, operands, place, into)
        values.update(zip(equation.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _called(equation: Any) -> Any:
    """The jaxpr that an equation runs once on its operands, if it is such a call."""
    if equation.primitive.name in _CONTROL:
        return None
    for name in ("jaxpr", "call_jaxpr"):
        jaxpr = _open(equation.params.get(name))
        if hasattr(jaxpr, "eqns") and len(jaxpr.invars) == len(equation.invars):
            return jaxpr
    return None


def _operation(each: _Operation, times: int, found: Found, note: Note) -> None:
    equation, name = each.equation, each.equation.primitive.name
    if name in _CONTROL:
        _CONTROL[name](each, times, found, note)
        return
    if name in UNKNOWN:
        note(f"FLOPs of {name} in {each.scope.label}")
    elif _has_jaxpr(equation) and not arithmetic(equation).elementwise:
        note(f"work inside of {name} in {each.scope.label}")
    moved = _fused_bytes(each) if name in FUSIBLE else bytes_moved(equation)
    work = arithmetic(equation) + Figures(bytes=moved)
    found(each.scope, work.times(times))


def _has_jaxpr(equation: Any) -> bool:
    """Whether it runs a program; the body of a scatter or reduction is one operator."""
    if equation.primitive.name.startswith(("scatter", "reduce")):
        return False
    return any(True for _ in core.jaxprs_in_params(equation.params))


def _fused_bytes(each: _Operation) -> int:
    """An operand that another operation left in memory is read once."""
    moved = sum(value.bytes for value in each.results if value.in_memory)
    taken = sum(value.bytes for value in each.results)
    for value in each.operands:
        if value.in_memory and not value.at_hand:
            value.at_hand = True
            moved += min(value.bytes, taken)  # a slice reads what it takes
    return moved


def _scan(each: _Operation, times: int, found: Found, note: Note) -> None:
    params = each.equation.params
    _walk(params["jaxpr"], each.scope, times * params["length"], found, note)


def _while(each: _Operation, times: int, found: Found, note: Note) -> None:
    note(f"trip count of a while loop in {each.scope.label}; counted as one")
    for name in ("cond_jaxpr", "body_jaxpr"):
        _walk(each.equation.params[name], each.scope, times, found, note)


def _cond(each: _Operation, times: int, found: Found, note: Note) -> None:
    def cost(branch: list[tuple[Scope, Figures]]) -> tuple[int, int, int]:
        total = sum((work for _, work in branch), Figures())
        return total.flops, total.elementwise, total.bytes

    branches = []
    for jaxpr in each.equation.params["branches"]:
        branch: list[tuple[Scope, Figures]] = []
        _walk(jaxpr, each.scope, times, lambda *work, to=branch: to.append(work), note)
        branches.append(branch)
    for scope, work in max(branches, key=cost):
        found(scope, work)


def _shard_map(each: _Operation, times: int, found: Found, note: Note) -> None:
    params = each.equation.params
    devices = math.prod(
        params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
    )
    _walk(params["jaxpr"], each.scope, times * devices, found, note)


def _pallas(each: _Operation, times: int, found: Found, note: Note) -> None:
    estimate = each.equation.params["cost_estimate"]
    if estimate is None:
        note(f"FLOPs of a Pallas kernel without cost_estimate in {each.scope.label}")
        work = Figures(bytes=bytes_moved(each.equation))
    else:
        work = Figures(
            flops=estimate.flops,
            macs=estimate.flops // 2,
            elementwise=estimate.transcendentals,
            bytes=estimate.bytes_accessed,
        )
    found(each.scope, work.times(times))


_CONTROL: dict[str, Callable[[_Operation, int, Found, Note], None]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _pallas,
}
