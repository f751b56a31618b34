"""Which line of the user's program a value of a compiled program comes from.

Instructions that compute carry a source; loops, tuples and copies only pass values on.
For those the instruction that made the value is looked for: a loop's state comes from
the body's result.
"""

from jaxspeed.plan import hlo, loops

_PASSED_ON = ("bitcast", "copy", "copy-done", "copy-start", "get-tuple-element")
_BEGINS = ("constant", "parameter")
_DEEPEST = 32


class Origins:
    """Finds sources in one program."""

    def __init__(self, module: hlo.Module) -> None:
        self._module = module
        self._places = {
            name: computation
            for computation in module.computations.values()
            for name in computation.instructions
        }
        self._bodies = {
            loops.condition_and_body(instruction)[1]: (computation, instruction)
            for computation in module.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "while"
        }

    def is_argument(self, name: str) -> bool:
        """Whether this is one of the program's own arguments."""
        entry = self._module.computations[self._module.entry]
        found = entry.instructions.get(name)
        return found is not None and found.opcode == "parameter"

    def source(self, name: str, index: str = "{}") -> str:
        """`file:line op_name` of what made element `{0,1}` of a value; may be empty."""
        path = tuple(int(number) for number in index.strip("{}").split(",") if number)
        place = self._places.get(name)
        found = self._follow(place, name, path, _DEEPEST) if place else ""
        return found.replace("\\'", "'")

    def _follow(
        self, place: hlo.Computation, name: str, path: tuple[int, ...], depth: int
    ) -> str:
        instruction = place.instructions[name]
        source = self._module.source(instruction)
        operands, opcode = instruction.operands, instruction.opcode
        if not depth:
            return source
        if opcode == "while" and path:
            body = self._module.computations[loops.condition_and_body(instruction)[1]]
            made = self._follow(body, body.root, path, depth - 1)
            return made or self._follow(place, operands[0], path, depth - 1) or source
        if opcode == "tuple" and path:
            return self._follow(place, operands[path[0]], path[1:], depth - 1)
        if opcode == "parameter" and path and place.name in self._bodies:
            outside, loop = self._bodies[place.name]
            return self._follow(outside, loop.operands[0], path, depth - 1)
        if opcode in _PASSED_ON and operands:
            if opcode == "get-tuple-element":
                path = (int(instruction.attribute(r"\bindex=(\d+)") or 0), *path)
            elif opcode.startswith("copy-"):
                path = ()
            return self._follow(place, operands[0], path, depth - 1) or source
        if not source and opcode not in _BEGINS and operands:
            # Made by the compiler, out of something that has a source.
            return self._follow(place, operands[0], (), depth - 1)
        return source
