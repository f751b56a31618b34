"""The text of a compiled XLA program (HLO), read into a table of computations.

What a compiled step does is public in one form only: `compiled.as_text()`. This module
knows that text's grammar (types, operands, attributes, source positions) and nothing
of its meaning. Instructions keep their text and take it apart when asked, so that
programs of a hundred thousand instructions parse in a second or two.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = "
    r"(?P<type>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
# Memory space 1 of a TPU is on the chip; its layouts are tiled. Untiled, it is the part
# of a GPU's memory that collectives reach. 5 is the host's; the rest is for scalars.
_HBM = re.compile(r"(?!.*S\(\d+\))|(?!.*T\()(?=.*S\(1\))")
_DTYPE_BITS = re.compile(r"(?:s|u|f|bf|c)(\d+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
# An element of a tuple as an operand, which newer compilers write in place of an
# instruction of its own: `%loop#3`.
_ELEMENT = re.compile(r"%([\w.\-]+)#(\d+)((?:#\d+)*)")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Element type and dims of one array, without its layout."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements; those narrower than a byte are packed, no padding.

        Raises:
            ValueError: an element type whose width is not known.
        """
        return -(-self.size * _bits(self.dtype) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _shape(dtype: str, dims: str) -> Shape:
    return Shape(dtype, tuple(int(dim.strip("<=")) for dim in dims.split(",") if dim))


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    if dtype in ("token", "opaque"):
        return 0
    match = _DTYPE_BITS.match(dtype)
    if match is None:
        raise ValueError(
            f"unknown HLO element type {dtype!r}; known are pred, token, opaque and "
            "s, u, f, bf or c followed by a number of bits"
        )
    return int(match[1])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        type: the type of the result as written; several arrays for a tuple.
        opcode: `all-reduce`, `fusion`, ...
        arguments: what stands between the parentheses.
        attributes: what follows them.
    """

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result, those of nested tuples in order."""
        return tuple(
            _shape(dtype, dims) for dtype, dims, _ in _ARRAY.findall(self.type)
        )

    @property
    def hbm_shapes(self) -> tuple[Shape | None, ...]:
        """Like `shapes`; None for arrays that lie elsewhere than in device memory."""
        return tuple(
            _shape(dtype, dims) if _HBM.match(layout) else None
            for dtype, dims, layout in _ARRAY.findall(self.type)
        )

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands (the value of a constant, the index of a parameter)."""
        if "%" in self.arguments:
            return tuple(re.findall(r"%([\w.\-#]+)", self.arguments))
        return tuple(word.split(" ")[-1] for word in self.arguments.split(", ") if word)

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs, in the order written."""
        return tuple(
            name
            for value in _CALLED.findall(self.attributes)
            for name in re.findall(r"[\w.\-]+", value)
        )

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern`, a regular expression, in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program.

    Attributes:
        instructions: by name, in program order.
        root: name of the instruction that gives the result.
    """

    name: str
    instructions: Mapping[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program.

    Attributes:
        computations: by name.
        entry: name of the one that runs first.
        num_partitions, num_replicas: the program runs on their product of devices.
        frames: `file:line` of each stack frame that instructions refer to.
    """

    computations: Mapping[str, Computation]
    entry: str
    num_partitions: int
    num_replicas: int
    frames: Mapping[str, str]

    def source(self, instruction: Instruction) -> str:
        """Where the instruction comes from, `file:line op_name`, as far as known."""
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        place = self.frames.get(frame or "", "")
        file = instruction.attribute(r'source_file="([^"]*)"')
        if file:
            line = instruction.attribute(r"source_line=(\d+)")
            place = f"{file}:{line or '?'}"
        name = instruction.attribute(r'op_name="([^"]*)"') or ""
        return f"{place} {name}".strip()


def parse(text: str) -> Module:
    """Reads the text of one compiled program.

    Args:
        text: `jax.jit(f).lower(...).compile().as_text()`.

    Raises:
        ValueError: it is not the text of exactly one HLO module.
    """
    computations: dict[str, Computation] = {}
    entries: list[str] = []
    tables: dict[str, list[str]] = {table: [] for table in _TABLES}
    table = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            instruction = _instruction(match)
            _add_elements(instruction, instructions)
            instructions[instruction.name] = instruction
            root = instruction.name if match["root"] else root
        elif header := _COMPUTATION.fullmatch(line.strip()):
            name, root, instructions = header[2], "", {}
            entries += [name] if header[1] else []
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions, root)
        elif line in tables:
            table = line
        elif table and line[:1].isdigit():
            tables[table].append(line)
    if len(entries) != 1:
        raise ValueError(
            f"found {len(entries)} ENTRY computations, not 1, in a text that starts "
            f"with {text[:40]!r}; pass jax.jit(f).lower(...).compile().as_text(), the "
            "optimized HLO of one program (lowered.as_text() is StableHLO)"
        )
    return Module(
        computations=computations,
        entry=entries[0],
        num_partitions=_header_number(text, "num_partitions"),
        num_replicas=_header_number(text, "replica_count"),
        frames=_frames(tables),
    )


def _instruction(match: re.Match[str]) -> Instruction:
    """Splits what follows the opcode at the parenthesis that closes the operands."""
    rest, depth, end = match["rest"], 1, len(match["rest"])
    for parenthesis in re.finditer(r"[()]", rest):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            end = parenthesis.start()
            break
    arguments = re.sub(r"/\*.*?\*/", "", rest[:end])
    return Instruction(
        match["name"], match["type"], match["opcode"], arguments, rest[end + 1 :]
    )


def _add_elements(user: Instruction, instructions: dict[str, Instruction]) -> None:
    """Adds the instruction that each operand written `%tuple#index` stands for.

    The tuple stands before its user: programs are printed in the order they run in.
    """
    for name, index, more in _ELEMENT.findall(user.arguments):
        for number in (index, *more.split("#")[1:]):
            element = f"{name}#{number}"
            if element not in instructions:
                kind = _element_types(instructions[name].type)[int(number)]
                instructions[element] = Instruction(
                    element, kind, "get-tuple-element", f"%{name}", f", index={number}"
                )
            name = element


def _element_types(kind: str) -> list[str]:
    """The types of a tuple's elements, from the type of the tuple."""
    types, depth, start = [], 0, 1
    kind = re.sub(r"/\*.*?\*/", "", kind)
    for found in re.finditer(r"[(\[{]|[)\]}]|, ", kind):
        depth += {"(": 1, "[": 1, "{": 1, ", ": 0}.get(found[0], -1)
        if (found[0] == ", " and depth == 1) or depth == 0:
            types.append(kind[start : found.start()])
            start = found.end()
    return types


def _header_number(text: str, key: str) -> int:
    match = re.search(rf"^HloModule .*\b{key}=(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 1


def _frames(tables: Mapping[str, list[str]]) -> dict[str, str]:
    """`file:line` by stack frame id, from the tables that precede the computations."""
    files = {
        match[1]: match[2]
        for line in tables["FileNames"]
        if (match := re.match(r'(\d+) "(.*)"', line))
    }
    locations = {
        match[1]: f"{files.get(match[2], '?')}:{match[3]}"
        for line in tables["FileLocations"]
        if (match := re.match(r"(\d+) \{file_name_id=(\d+).*? line=(\d+)", line))
    }
    return {
        match[1]: locations.get(match[2], "?")
        for line in tables["StackFrames"]
        if (match := re.match(r"(\d+) \{file_location_id=(\d+)", line))
    }
