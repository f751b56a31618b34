"""The walk through a scheduled program, instruction by instruction.

Values carry the transfers that produce them: from a start through tuples and the state
of loops to its done, which may be in the next iteration.
"""

import dataclasses
from collections.abc import Mapping

from jaxspeed.plan import hlo, loops
from jaxspeed.plan.clock import Flight
from jaxspeed.plan.device import Device, Sending, awaited_chains

_ASYNC_CALLS = ("async-start", "call-start")
_CALLS = ("call", "custom-call")
_COPIES = ("copy-start", "slice-start")
_SAME_VALUE = ("bitcast", "opt-barrier", "optimization-barrier")
_CHANNEL = r"channel_id=(\d+)"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An asynchronous call whose operands its update gives, and which starts there."""

    scope: loops.Scope
    start: hlo.Instruction


Carried = dict[tuple[int, ...], Flight | Prepared]
"""What a value waits for, by the place in its tuple."""


class Walk:
    """Runs a program on a device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        # Transfers that other instructions than the users of their values wait for.
        self._chains: dict[str, Flight] = {}
        self._channels: dict[str, Flight] = {}

    def run(
        self, scope: loops.Scope, arguments: Mapping[int, Carried] | None = None
    ) -> Carried:
        """Runs a computation once.

        Args:
            scope: the computation.
            arguments: what its parameters carry.

        Returns:
            what its result carries.
        """
        values: dict[str, Carried] = {}
        for instruction in scope.computation.instructions.values():
            if instruction.opcode == "parameter":
                carried = (arguments or {}).get(int(instruction.arguments), {})
            else:
                carried = self._step(scope, instruction, values)
            if carried:
                values[instruction.name] = carried
        return values.get(scope.computation.root, {})

    def _step(
        self,
        scope: loops.Scope,
        instruction: hlo.Instruction,
        values: Mapping[str, Carried],
    ) -> Carried:
        """Runs one instruction; returns what its value carries."""
        opcode = instruction.opcode
        if opcode in ("tuple", "conditional", *_CALLS):
            arguments = {
                index: values[name]
                for index, name in enumerate(instruction.operands)
                if name in values
            }
            return self._with_arguments(scope, instruction, arguments)
        carried: Carried = {}
        if values and instruction.operands:
            carried = values.get(instruction.operands[0], {})
        if opcode == "get-tuple-element":
            index = int(instruction.attribute(r"\bindex=(\d+)") or 0)
            return {at[1:]: each for at, each in carried.items() if at[:1] == (index,)}
        if opcode in _SAME_VALUE:
            return carried
        if opcode == "while":
            return self._loop(scope, instruction, carried)
        if opcode == "async-update":
            return self._update(carried)
        if opcode.endswith("-done"):
            self._done(instruction, carried)
            return {}
        return self._execute(scope, instruction)

    def _with_arguments(
        self,
        scope: loops.Scope,
        instruction: hlo.Instruction,
        arguments: Mapping[int, Carried],
    ) -> Carried:
        if instruction.opcode == "tuple":
            return {
                (index, *at): each
                for index, carried in arguments.items()
                for at, each in carried.items()
            }
        if instruction.opcode == "conditional":
            return self._conditional(scope, instruction, arguments)
        if not instruction.called:
            return self._execute(scope, instruction)
        callee = scope.call(instruction.called[0], instruction.operands)
        return self.run(callee, arguments)

    def _loop(
        self, scope: loops.Scope, loop: hlo.Instruction, carried: Carried
    ) -> Carried:
        """Simulates the first iteration, and the second in place of all the others."""
        device, frequency = self.device, self.device.frequency
        trips = loops.trip_count(scope, loop)
        runs = 1 if trips is None else trips
        condition, body = (
            scope.iterate(name, loop) for name in loops.condition_and_body(loop)
        )
        for iteration in range(min(runs, 2)):
            times = None if trips is None else (runs - 1 if iteration else 1)
            device.frequency = frequency.times(times)
            began = device.clock.now
            self.run(condition)
            carried = self.run(body, {0: carried})
            if iteration:
                device.clock.skip((device.clock.now - began) * (runs - 2))
        device.frequency = frequency if trips is not None else frequency.times(None)
        self.run(condition)
        device.frequency = frequency
        return carried

    def _conditional(
        self,
        scope: loops.Scope,
        instruction: hlo.Instruction,
        arguments: Mapping[int, Carried],
    ) -> Carried:
        """Takes the branch that sends most, or else computes most."""
        device, frequency = self.device, self.device.frequency
        branches = [
            (scope.call(name, (operand,)), arguments.get(index, {}))
            for index, (name, operand) in enumerate(
                zip(instruction.called, instruction.operands[1:], strict=True), 1
            )
        ]
        taken, carried = max(branches, key=lambda branch: device.size(branch[0]))
        device.frequency = dataclasses.replace(frequency, conditional=True)
        carried = self.run(taken, {0: carried})
        device.frequency = frequency
        return carried

    def _update(self, carried: Carried) -> Carried:
        prepared = carried.get(())
        if isinstance(prepared, Prepared):
            return self._start_call(prepared.scope, prepared.start)
        return carried

    def _done(self, instruction: hlo.Instruction, carried: Carried) -> None:
        for each in carried.values():
            if isinstance(each, Flight):
                self.device.clock.wait(each)
        if instruction.opcode == "recv-done":
            received = self._channels.get(instruction.attribute(_CHANNEL) or "")
            if received is not None:
                self.device.clock.wait(received)

    def _execute(self, scope: loops.Scope, instruction: hlo.Instruction) -> Carried:
        """Runs an instruction that is neither control flow nor waits for another."""
        if instruction.opcode in _ASYNC_CALLS:
            if not instruction.operands:
                return {(): Prepared(scope, instruction)}
            return self._start_call(scope, instruction)
        if instruction.opcode in _COPIES:
            return {(): self.device.copy(scope, instruction)}
        if instruction.opcode == "fusion":
            self._fusion(scope, instruction)
            return {}
        sending = self.device.sending(scope, instruction)
        if sending is not None:
            return self._collective(sending)
        self.device.compute(scope, instruction)
        return {}

    def _collective(self, sending: Sending) -> Carried:
        """Starts a collective, and waits for it unless it is asynchronous."""
        flight = self.device.depart(sending, sending.collective.asynchronous)
        if not sending.collective.asynchronous:
            self.device.clock.wait(flight)
        if sending.instruction.opcode == "send":
            channel = sending.instruction.attribute(_CHANNEL) or ""
            self._channels[channel] = flight
        return {(): flight}

    def _start_call(self, scope: loops.Scope, start: hlo.Instruction) -> Carried:
        """Starts a computation that runs aside, on the links or in device memory."""
        callee = scope.call(start.called[0], start.operands)
        flights = [
            self.device.depart(sending, asynchronous=True)
            for sending in self.device.sendings_inside(callee)
        ]
        flights = flights or [self.device.call_aside(callee)]
        return {(): max(flights, key=lambda flight: flight.end)}

    def _fusion(self, scope: loops.Scope, fusion: hlo.Instruction) -> None:
        """Computes; on TPU it may also start, contain or wait for collectives."""
        callee = scope.call(fusion.called[0], fusion.operands)
        for chain in awaited_chains(callee.computation):
            if chain in self._chains:
                self.device.clock.wait(self._chains[chain])
        for sending in self.device.sendings_inside(callee):
            chain = sending.chain if sending.collective.asynchronous else None
            flight = self.device.depart(sending, asynchronous=chain is not None)
            if chain is None:
                self.device.clock.wait(flight)
            else:
                self._chains[chain] = flight
        self.device.compute(scope, fusion)
