"""One device that runs a program's instructions: what each costs, and what it sends."""

import dataclasses
from collections.abc import Iterator

from jax.sharding import AbstractMesh, Mesh

from jaxspeed.chips import Chip
from jaxspeed.plan import flops, groups, hlo, loops, network, traffic
from jaxspeed.plan.clock import Clock, Flight
from jaxspeed.plan.collective import Collective, collective_of, is_continued, members_of

_DONE = "AsyncCollectiveDone"
_Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Sending:
    """A collective instruction of the program, with its use of the network.

    Attributes:
        account: its number in `Device.sent`.
        chain: links the fusions of one asynchronous TPU collective; else None.
    """

    account: int
    instruction: hlo.Instruction
    collective: Collective
    transfer: network.Transfer

    @property
    def chain(self) -> str | None:
        return _chain(self.instruction)


class Device:
    """Runs instructions on a clock.

    Attributes:
        clock: the device's time.
        sent: each collective instruction that ran, with all its executions, and its
            seconds on the links.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, chip: Chip) -> None:
        self._grid = network.grid_of(mesh, chip)
        self.clock = Clock(self._grid.num_links)
        self.sent: list[tuple[Collective, float]] = []
        self._frequency = traffic.Frequency()
        self._chip = chip
        self._axes = mesh.shape
        self._sendings: dict[_Key, Sending | None] = {}
        self._costs: dict[_Key, tuple[float, float]] = {}
        self._transfers: dict[tuple[str, groups.Groups, int], network.Transfer] = {}

    @property
    def frequency(self) -> traffic.Frequency:
        """How often what happens now happens in a run of the program."""
        return self._frequency

    @frequency.setter
    def frequency(self, frequency: traffic.Frequency) -> None:
        self._frequency = frequency
        self.clock.weight = frequency.count

    def compute(self, scope: loops.Scope, instruction: hlo.Instruction) -> None:
        """Runs an instruction that sends nothing."""
        self.clock.compute(*self._cost(scope, instruction))

    def copy(self, scope: loops.Scope, start: hlo.Instruction) -> Flight:
        """Starts an asynchronous copy or slice."""
        _, seconds = self._cost(scope, start)
        return self.clock.start_copy(seconds)

    def call_aside(self, scope: loops.Scope) -> Flight:
        """Starts a computation without collectives beside the main one."""
        seconds = max(self._seconds(flops.scope_flops(scope)))
        return self.clock.start_copy(seconds)

    def depart(self, sending: Sending, asynchronous: bool) -> Flight:
        """Starts a collective and enters it into `sent`."""
        collective, seconds = self.sent[sending.account]
        count = collective.count + self._frequency.count
        known = collective.trip_count_known and self._frequency.trip_count_known
        self.sent[sending.account] = (
            dataclasses.replace(
                collective,
                count=count,
                bytes_sent=collective.bytes_of(count),
                asynchronous=asynchronous,
                trip_count_known=known,
                conditional=collective.conditional or self._frequency.conditional,
            ),
            seconds + sending.transfer.seconds * self._frequency.count,
        )
        return self.clock.start(sending.account, sending.transfer)

    def sending(
        self, scope: loops.Scope, instruction: hlo.Instruction
    ) -> Sending | None:
        """What a collective sends; None for any other instruction."""
        key = (scope.computation.name, instruction.name)
        if key not in self._sendings:
            self._sendings[key] = self._new_sending(scope, instruction)
        return self._sendings[key]

    def sendings_inside(self, scope: loops.Scope) -> Iterator[Sending]:
        """The collectives of a computation and of those that it calls."""
        for instruction in scope.computation.instructions.values():
            found = self.sending(scope, instruction)
            if found is not None:
                yield found
            elif instruction.opcode in ("fusion", "call", "custom-call", "async-start"):
                for name in instruction.called:
                    callee = scope.call(name, instruction.operands)
                    yield from self.sendings_inside(callee)

    def size(self, scope: loops.Scope) -> tuple[int, int]:
        """Bytes that a computation sends, and its operations."""
        sent = sum(each.bytes_sent for each in traffic.executed(scope, self._axes))
        return sent, flops.scope_flops(scope).total

    def _new_sending(
        self, scope: loops.Scope, instruction: hlo.Instruction
    ) -> Sending | None:
        collective = collective_of(scope, instruction, self._axes)
        if collective is None:
            return None
        members = members_of(scope, instruction, collective.op)
        transfer = self._transfer(collective.op, members, collective.bytes_sent)
        nothing = dataclasses.replace(collective, count=0, bytes_sent=0)
        self.sent.append((nothing, 0.0))
        return Sending(len(self.sent) - 1, instruction, collective, transfer)

    def _transfer(
        self, op: str, members: groups.Groups, num_bytes: int
    ) -> network.Transfer:
        key = (op, members, num_bytes)
        if key not in self._transfers:
            grid, chip = self._grid, self._chip
            if op == "collective-permute":
                transfer = network.permute(grid, chip, members, num_bytes)
            else:
                transfer = network.group_collective(grid, chip, op, members, num_bytes)
            self._transfers[key] = transfer
        return self._transfers[key]

    def _cost(
        self, scope: loops.Scope, instruction: hlo.Instruction
    ) -> tuple[float, float]:
        """Seconds of computation and of device memory, which overlap."""
        key = (scope.computation.name, instruction.name)
        if key not in self._costs:
            self._costs[key] = self._seconds(
                flops.instruction_flops(scope.module, scope.computation, instruction)
            )
        return self._costs[key]

    def _seconds(self, cost: flops.Flops) -> tuple[float, float]:
        return (
            cost.total / self._chip.bf16_flops,
            cost.hbm_bytes / self._chip.hbm_bytes_per_second,
        )


def awaited_chains(computation: hlo.Computation) -> Iterator[str]:
    """Asynchronous TPU collectives that a fused computation waits for."""
    instructions = computation.instructions.values()
    if any(f'custom_call_target="{_DONE}"' in each.attributes for each in instructions):
        for each in instructions:
            chain = _chain(each)
            if chain is not None and is_continued(each):
                yield chain


def _chain(instruction: hlo.Instruction) -> str | None:
    return instruction.attribute(r'\bchain_id="([^"]*)"')
