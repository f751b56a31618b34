"""How often each loop of a compiled program runs.

CPU and GPU programs carry the trip count as an annotation. TPU programs do not, so it
is derived as the compiler does: the condition compares an induction variable with a
bound, the body adds a constant to it, and the caller gives its first value. Whatever
cannot be followed to constants is unknown; nothing is guessed.
"""

import dataclasses
from typing import NamedTuple

from jaxspeed.plan import hlo

_Path = tuple[int, ...]
_TRIP_COUNT = r'\\?"known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)'
_UNCHANGED = ("copy", "copy-done", "copy-start", "bitcast", "convert", "reshape")


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation together with who runs it.

    Attributes:
        arguments: for each parameter of a called computation, the caller's scope and
            the name of the value there.
        loop: for the body or condition of a loop, the scope that holds the `while`
            instruction, and that instruction.
    """

    module: hlo.Module
    computation: hlo.Computation
    arguments: tuple[tuple["Scope", str], ...] = ()
    loop: tuple["Scope", hlo.Instruction] | None = None

    def call(self, name: str, operands: tuple[str, ...]) -> "Scope":
        """The scope of computation `name` called from here."""
        arguments = tuple((self, operand) for operand in operands)
        return Scope(self.module, self.module.computations[name], arguments)

    def iterate(self, name: str, loop: hlo.Instruction) -> "Scope":
        """The scope of computation `name`, body or condition of `loop` here."""
        computation = self.module.computations[name]
        return Scope(self.module, computation, loop=(self, loop))


class _Linear(NamedTuple):
    """An integer: element `element` (a tuple path) of the loop's state + `offset`.

    `element` is None for a constant.
    """

    element: _Path | None
    offset: int


def condition_and_body(loop: hlo.Instruction) -> tuple[str, str]:
    """Names of the two computations of a `while` instruction."""
    condition = loop.attribute(r"\bcondition=%?([\w.\-]+)")
    body = loop.attribute(r"\bbody=%?([\w.\-]+)")
    assert condition and body, f"while instruction {loop.name} without its computations"
    return condition, body


def trip_count(scope: Scope, loop: hlo.Instruction) -> int | None:
    """Iterations of the `while` instruction `loop` of `scope`; None if unknown."""
    annotated = loop.attribute(_TRIP_COUNT)
    if annotated is not None:
        return int(annotated)
    condition, body = (scope.iterate(name, loop) for name in condition_and_body(loop))
    comparison = _comparison(condition)
    if comparison is None:
        return None
    induction, direction, bound = comparison
    if induction.element is None:
        return None
    step = _linear(body, body.computation.root, induction.element)
    start = _constant(scope, loop.operands[0], induction.element)
    last = bound.offset
    if bound.element is not None:
        carried = _unchanging((scope, loop), bound.element)
        if carried is None:
            return None
        last += carried
    if step is None or step.element != induction.element or start is None:
        return None
    return _iterations(start + induction.offset, step.offset, direction, last)


def _iterations(start: int, step: int, direction: str, bound: int) -> int | None:
    """How often `while (i <direction> bound) i += step` runs."""
    if step < 0:
        start, step, bound = -start, -step, -bound
        direction = {"GT": "LT", "GE": "LE", "NE": "NE"}.get(direction, "endless")
    distance = bound - start + (direction == "LE")
    if step == 0 or direction not in ("LT", "LE", "NE"):
        return None
    if direction == "NE" and (distance < 0 or distance % step):
        return None
    return max(0, -(-distance // step))


def _comparison(condition: Scope) -> tuple[_Linear, str, _Linear] | None:
    """The condition as `induction variable <direction> bound`."""
    scope = condition
    instruction = scope.computation.instructions[scope.computation.root]
    while instruction.opcode in ("fusion", "call"):
        scope = scope.call(instruction.called[0], instruction.operands)
        instruction = scope.computation.instructions[scope.computation.root]
    direction = instruction.attribute(r"\bdirection=(\w+)")
    if instruction.opcode != "compare" or direction is None:
        return None
    left, right = (_linear(scope, operand) for operand in instruction.operands)
    if left is None or right is None:
        return None
    if left.element is None:
        swapped = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
        return right, swapped.get(direction, direction), left
    return left, direction, right


def _unchanging(loop: tuple[Scope, hlo.Instruction], element: _Path) -> int | None:
    """The value of an element of the loop's state that the body only passes on."""
    caller, instruction = loop
    _, name = condition_and_body(instruction)
    body = caller.iterate(name, instruction)
    if _linear(body, body.computation.root, element) != _Linear(element, 0):
        return None
    return _constant(caller, instruction.operands[0], element)


def _constant(scope: Scope, name: str, path: _Path) -> int | None:
    """The value `name[path]` where it is the same each time `scope` runs."""
    value = _linear(scope, name, path)
    if value is None or value.element is None:
        return value.offset if value else None
    while scope.arguments:
        scope = scope.arguments[0][0]
    if scope.loop is None:
        return None
    carried = _unchanging(scope.loop, value.element)
    return None if carried is None else carried + value.offset


def _linear(scope: Scope, name: str, path: _Path = ()) -> _Linear | None:
    """The value `name[path]` in terms of the state of the loop around it."""
    instruction = scope.computation.instructions[name]
    operands = instruction.operands
    match instruction.opcode:
        case "constant":
            value = instruction.arguments
            return _Linear(None, int(value)) if value.lstrip("-").isdigit() else None
        case "parameter":
            if scope.arguments:
                return _linear(*scope.arguments[int(operands[0])], path)
            return _Linear(path, 0) if scope.loop else None
        case "get-tuple-element":
            index = instruction.attribute(r"\bindex=(\d+)")
            return _linear(scope, operands[0], (int(index or 0), *path))
        case "tuple" if path:
            return _linear(scope, operands[path[0]], path[1:])
        case opcode if opcode in _UNCHANGED:
            return _linear(scope, operands[0], path)
        case "fusion" | "call":
            callee = scope.call(instruction.called[0], operands)
            return _linear(callee, callee.computation.root, path)
        case "add" | "subtract":
            left, right = (_linear(scope, operand) for operand in operands)
            return _sum(left, right, 1 if instruction.opcode == "add" else -1)
    return None


def _sum(left: _Linear | None, right: _Linear | None, sign: int) -> _Linear | None:
    if left is None or right is None:
        return None
    if right.element is None:
        return _Linear(left.element, left.offset + sign * right.offset)
    if left.element is None and sign == 1:
        return _Linear(right.element, left.offset + right.offset)
    return None
