"""What a compiled program computes: operations and bytes of memory, per device.

Every instruction is counted as often as it runs, with the trip counts of its loops;
XLA's own `compiled.cost_analysis()` counts a loop's body once.
"""

import dataclasses
from collections.abc import Iterable

import jax

from jaxspeed.plan import accesses, hlo, loops, operations
from jaxspeed.plan.text import text_of

_STARTS = ("copy-start", "slice-start")


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations and memory traffic of one device in one run of the program.

    Attributes:
        matmul: operations of dots, convolutions and libraries' matmuls.
        kernels: operations that Pallas kernels claim (`pl.CostEstimate`).
        elementwise: other arithmetic, one for each element; not part of `total`.
        hbm_bytes: read from and written to device memory.
        remote_bytes: what Pallas kernels claim to send to other devices by themselves
            (`remote_bytes_transferred`), in no collective of the program.
        unknown_kernels: names of kernels that claim nothing: their operations are
            missing, their bytes are those of their operands and results.
        trip_counts_known: False if a loop's trip count could not be derived; it
            counts as one iteration.
        matmul_by_source: operations of matmuls by the `op_name` that they come from.
    """

    matmul: int = 0
    kernels: int = 0
    elementwise: int = 0
    hbm_bytes: int = 0
    remote_bytes: int = 0
    unknown_kernels: frozenset[str] = frozenset()
    trip_counts_known: bool = True
    matmul_by_source: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        """Operations of matmuls and kernels, those that a chip's peak is about."""
        return self.matmul + self.kernels

    def times(self, count: int) -> "Flops":
        """All of it `count` times."""
        return dataclasses.replace(
            self,
            matmul=self.matmul * count,
            kernels=self.kernels * count,
            elementwise=self.elementwise * count,
            hbm_bytes=self.hbm_bytes * count,
            remote_bytes=self.remote_bytes * count,
            matmul_by_source=tuple((k, n * count) for k, n in self.matmul_by_source),
        )


def flops(program: jax.stages.Compiled | str) -> Flops:
    """Operations and memory traffic of one device in one run of the program.

    Of the branches of a conditional the one with the most operations counts.

    Args:
        program: `jax.jit(f).lower(...).compile()`, or its text.

    Raises:
        ValueError: it is not one optimized program, or it has a matmul in a form that
            is not known.
    """
    module = hlo.parse(text_of(program))
    return scope_flops(loops.Scope(module, module.computations[module.entry]))


def add(parts: Iterable[Flops]) -> Flops:
    """The sum of several."""
    parts = list(parts)
    sources: dict[str, int] = {}
    for part in parts:
        for name, count in part.matmul_by_source:
            sources[name] = sources.get(name, 0) + count
    return Flops(
        matmul=sum(part.matmul for part in parts),
        kernels=sum(part.kernels for part in parts),
        elementwise=sum(part.elementwise for part in parts),
        hbm_bytes=sum(part.hbm_bytes for part in parts),
        remote_bytes=sum(part.remote_bytes for part in parts),
        unknown_kernels=frozenset().union(*(part.unknown_kernels for part in parts)),
        trip_counts_known=all(part.trip_counts_known for part in parts),
        matmul_by_source=tuple(sources.items()),
    )


def scope_flops(scope: loops.Scope) -> Flops:
    """What runs when `scope` does, loops and calls included."""
    return add(
        _executed(scope, instruction)
        for instruction in scope.computation.instructions.values()
    )


def _executed(scope: loops.Scope, instruction: hlo.Instruction) -> Flops:
    if instruction.opcode == "while":
        trips = loops.trip_count(scope, instruction)
        condition, body = loops.condition_and_body(instruction)
        runs = 1 if trips is None else trips
        return dataclasses.replace(
            add(
                scope_flops(scope.iterate(name, instruction)).times(count)
                for name, count in ((condition, runs + 1), (body, runs))
            ),
            trip_counts_known=trips is not None,
        )
    if instruction.opcode == "conditional":
        branches = [
            scope_flops(scope.call(name, (operand,)))
            for name, operand in zip(
                instruction.called, instruction.operands[1:], strict=True
            )
        ]
        return max(branches, key=lambda branch: (branch.total, branch.elementwise))
    if calls(instruction):
        return add(
            scope_flops(scope.call(name, instruction.operands))
            for name in instruction.called
        )
    return instruction_flops(scope.module, scope.computation, instruction)


def calls(instruction: hlo.Instruction) -> bool:
    """Whether it only runs other computations, at once or asynchronously."""
    return instruction.opcode in ("call", "call-start", "async-start") or (
        instruction.opcode == "custom-call"
        and "called_computations=" in instruction.attributes
    )


def instruction_flops(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction
) -> Flops:
    """One execution of an instruction that is neither control flow nor a call."""
    opcode = instruction.opcode
    if opcode in _STARTS:
        return Flops(hbm_bytes=accesses.copied_bytes(instruction))
    if opcode.endswith(("-done", "-update")):
        return Flops()
    num_bytes = accesses.hbm_bytes(module, computation, instruction)
    if opcode == "fusion":
        inside = add(
            _fused(module, fused, each)
            for fused in (module.computations[name] for name in instruction.called)
            for each in fused.instructions.values()
        )
        return dataclasses.replace(inside, hbm_bytes=num_bytes)
    counted = _operations(module, computation, instruction)
    if counted.kernels or counted.hbm_bytes:
        return counted
    return dataclasses.replace(counted, hbm_bytes=num_bytes)


def _fused(
    module: hlo.Module, fused: hlo.Computation, instruction: hlo.Instruction
) -> Flops:
    if instruction.opcode == "fusion":
        return instruction_flops(module, fused, instruction)
    return _operations(module, fused, instruction)


def _operations(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction
) -> Flops:
    """Operations of an instruction; bytes only those that a kernel claims."""
    matmul = operations.matmul_operations(computation, instruction)
    if matmul is not None:
        name = instruction.attribute(r'op_name="([^"]*)"') or instruction.name
        return Flops(matmul=matmul, matmul_by_source=((name, matmul),))
    if operations.is_kernel(instruction):
        return _kernel(module, instruction)
    return Flops(
        elementwise=operations.elementwise_operations(computation, instruction)
    )


def _kernel(module: hlo.Module, instruction: hlo.Instruction) -> Flops:
    estimate = operations.kernel_estimate(instruction)
    if estimate is None:
        source = module.source(instruction) or instruction.name
        return Flops(unknown_kernels=frozenset({source}))
    return Flops(
        kernels=estimate.get("flops", 0),
        hbm_bytes=estimate.get("bytes_accessed", 0),
        remote_bytes=estimate.get("remote_bytes_transferred", 0),
    )
