"""Bytes that single HLO instructions read from and write to device memory.

An instruction reads its operands and writes its results, with these exceptions: what
lies on the chip (VMEM on TPU) costs nothing; a slice reads and an update in place
writes the slice alone, also inside a fusion; what only renames values moves nothing.
Collectives count nothing: their bytes are the network's. Reuse in caches is not
modelled: an operand that a kernel reads twice counts once.
"""

from jaxspeed.plan import hlo

_FREE = frozenset(
    "after-all add-dependency bitcast call conditional constant domain "
    "get-tuple-element iota opt-barrier optimization-barrier parameter partition-id "
    "replica-id tuple while".split()
)
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-",
    "ragged-all-to-all",
    "recv",
    "reduce-scatter",
    "send",
)
_SLICES = ("dynamic-slice", "slice", "gather")
# Updates in place, and which operand is the update; the first is what is updated.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
_RENAMES = ("bitcast", "reshape", "copy", "convert", "transpose")


def hbm_bytes(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction
) -> int:
    """Bytes that one execution moves between the device's memory and its cores.

    Control flow and calls count nothing: their computations do.
    """
    if instruction.opcode in _FREE or instruction.opcode.startswith(_COLLECTIVES):
        return 0
    if instruction.opcode == "fusion":
        return _fusion(module, computation, instruction)
    operands = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode in _SLICES:
        return 2 * _stored(instruction)
    update = _UPDATES.get(instruction.opcode)
    if update is not None:
        return 2 * _stored(operands[update])
    return _stored(instruction) + sum(_stored(operand) for operand in operands)


def copied_bytes(start: hlo.Instruction) -> int:
    """Bytes that an asynchronous copy or slice moves in or out of device memory."""
    shapes = [shape for shape in start.hbm_shapes if shape is not None and shape.dims]
    if start.opcode == "slice-start":
        # The result type holds the whole source, then what is cut from it.
        whole, *cut = start.shapes
        del whole
        return sum(shape.bytes for shape in cut if shape.dims)
    return sum(shape.bytes for shape in shapes)


def _stored(instruction: hlo.Instruction) -> int:
    """Bytes of the arrays of a value that lie in device memory."""
    return sum(shape.bytes for shape in instruction.hbm_shapes if shape is not None)


def _fusion(
    module: hlo.Module, computation: hlo.Computation, fusion: hlo.Instruction
) -> int:
    fused = module.computations[fusion.called[0]]
    readers = _readers(fused)
    total = 0
    for instruction in fused.instructions.values():
        if instruction.opcode != "parameter":
            continue
        index = int(instruction.arguments)
        operand = computation.instructions[fusion.operands[index]]
        total += min(_stored(operand), _read(module, fused, readers, instruction))
    return total + _written(module, fused, fusion)


def _readers(
    computation: hlo.Computation,
) -> dict[str, list[hlo.Instruction]]:
    """The instructions that use each value of a computation."""
    readers: dict[str, list[hlo.Instruction]] = {}
    for instruction in computation.instructions.values():
        if instruction.opcode in ("parameter", "constant"):
            continue
        for name in dict.fromkeys(instruction.operands):
            readers.setdefault(name, []).append(instruction)
    return readers


def _read(
    module: hlo.Module,
    fused: hlo.Computation,
    readers: dict[str, list[hlo.Instruction]],
    value: hlo.Instruction,
) -> int:
    """Bytes of a value inside a fusion that its readers need, at most all of it."""
    whole = sum(shape.bytes for shape in value.shapes)
    total = 0
    for reader in readers.get(value.name, ()):
        if reader.opcode in _SLICES and reader.operands[0] == value.name:
            total += sum(shape.bytes for shape in reader.shapes)
        elif reader.opcode in _UPDATES and reader.operands[0] == value.name:
            # A scatter combines what is there with the update.
            if reader.opcode == "scatter":
                total += _update_bytes(fused, reader)
        elif _is_passed_on(reader):
            continue
        elif reader.opcode in _RENAMES:
            total += _read(module, fused, readers, reader)
        elif reader.opcode == "fusion":
            total += _read_by_fusion(module, fused, readers, reader, value.name)
        else:
            return whole
    return min(whole, total)


def _is_passed_on(reader: hlo.Instruction) -> bool:
    """Whether a reader inside a fusion only sends its operands, or returns them."""
    return reader.opcode == "tuple" or (
        reader.opcode.startswith(_COLLECTIVES)
        or 'custom_call_target="AsyncCollective' in reader.attributes
    )


def _read_by_fusion(
    module: hlo.Module,
    fused: hlo.Computation,
    readers: dict[str, list[hlo.Instruction]],
    reader: hlo.Instruction,
    name: str,
) -> int:
    """A fusion inside a fusion that only renames passes on what its readers need."""
    inner = module.computations[reader.called[0]]
    only_renames = all(
        each.opcode in (*_RENAMES, "parameter") for each in inner.instructions.values()
    )
    if only_renames and len(reader.operands) == 1:
        return _read(module, fused, readers, reader)
    inner_readers = _readers(inner)
    return sum(
        _read(module, inner, inner_readers, each)
        for each in inner.instructions.values()
        if each.opcode == "parameter" and reader.operands[int(each.arguments)] == name
    )


def _written(
    module: hlo.Module, fused: hlo.Computation, fusion: hlo.Instruction
) -> int:
    """Bytes of a fusion's results in device memory; of updates in place, the update."""
    root = fused.instructions[fused.root]
    names = root.operands if root.opcode == "tuple" else (root.name,)
    roots = [fused.instructions[name] for name in names]
    if len(roots) != len(fusion.hbm_shapes):
        return _stored(fusion)
    return sum(
        min(shape.bytes, _update(module, fused, each))
        for each, shape in zip(roots, fusion.hbm_shapes, strict=True)
        if shape is not None
    )


def _update(module: hlo.Module, fused: hlo.Computation, value: hlo.Instruction) -> int:
    """Bytes of `value` that are new: of an update in place, the update alone.

    What the fusion was given, or receives from other devices, is not.
    """
    while value.opcode in ("bitcast", "reshape", "fusion"):
        if value.opcode == "fusion":
            fused = module.computations[value.called[0]]
            value = fused.instructions[fused.root]
        else:
            value = fused.instructions[value.operands[0]]
    if value.opcode == "parameter" or _is_passed_on(value):
        return 0
    if value.opcode in _UPDATES:
        return _update_bytes(fused, value)
    return sum(shape.bytes for shape in value.shapes)


def _update_bytes(fused: hlo.Computation, value: hlo.Instruction) -> int:
    update = fused.instructions[value.operands[_UPDATES[value.opcode]]]
    return sum(shape.bytes for shape in update.shapes)
