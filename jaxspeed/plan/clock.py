"""A clock for one device: what computes, what is on the links, and who waits for whom.

Computation advances the clock. Transfers run beside it; those that share a link take
turns on it in the order in which they start. While the device waits for one, every
transfer under way is exposed; the rest of a transfer's time is hidden under
computation. Copies to and from the chip's own memory run beside computation, too, with
what computation leaves of the device memory's bandwidth.
"""

import dataclasses

import numpy as np

from jaxspeed.plan.network import Transfer

COPY = -1
"""Stands for the account of copies, which are not on the network."""


@dataclasses.dataclass
class Flight:
    """A transfer or copy that was started and runs from `begin` to `end` seconds.

    Attributes:
        account: the number that its exposed time is booked under; `COPY` for a copy.
    """

    account: int
    begin: float
    end: float


class Clock:
    """The time of one device, in seconds since the program's start.

    Attributes:
        now: the current time.
        weight: how often what happens now happens in a run of the program.
        waited: weighted seconds in which the device only waited for transfers.
        exposed: weighted seconds of each account's transfers during such waits.
    """

    def __init__(self, num_links: int) -> None:
        self.now = 0.0
        self.weight = 1
        self.waited = 0.0
        self.exposed: dict[int, float] = {}
        self._free = np.zeros(num_links)
        self._copies_end = 0.0
        self._flights: list[Flight] = []

    @property
    def end(self) -> float:
        """When all that was started has ended, at the earliest now."""
        return max(self.now, self._copies_end, float(self._free.max(initial=0.0)))

    def compute(self, seconds: float, memory_seconds: float) -> None:
        """Advances by computation that also moves data in device memory.

        Both go on at once. Copies under way are delayed by the memory's time.
        """
        if memory_seconds:
            self._delay_copies(memory_seconds)
        self.now += max(seconds, memory_seconds)

    def start(self, account: int, transfer: Transfer) -> Flight:
        """Puts a transfer on its links, on each behind those that came before."""
        ends = np.maximum(self._free[transfer.links], self.now) + transfer.busy
        self._free[transfer.links] = ends
        end = float(ends.max())
        return self._fly(Flight(account, end - transfer.seconds, end))

    def start_copy(self, seconds: float) -> Flight:
        """Starts a copy in device memory, behind those that came before."""
        begin = max(self.now, self._copies_end)
        self._copies_end = begin + seconds
        return self._fly(Flight(COPY, begin, self._copies_end))

    def wait(self, flight: Flight) -> None:
        """Advances to the end of a transfer or copy."""
        seconds = flight.end - self.now
        if seconds <= 0:
            return
        if flight.account != COPY:
            self.waited += seconds * self.weight
            for each in self._flights:
                overlap = min(each.end, flight.end) - max(each.begin, self.now)
                if overlap > 0 and each.account != COPY:
                    total = self.exposed.get(each.account, 0.0)
                    self.exposed[each.account] = total + overlap * self.weight
        self.now = flight.end

    def skip(self, seconds: float) -> None:
        """Lets time pass with everything under way moving along, as a loop repeats."""
        self.now += seconds
        self._free += seconds
        self._copies_end += seconds
        for each in self._flights:
            each.begin += seconds
            each.end += seconds

    def _fly(self, flight: Flight) -> Flight:
        self._flights = [each for each in self._flights if each.end > self.now]
        self._flights.append(flight)
        return flight

    def _delay_copies(self, seconds: float) -> None:
        if self._copies_end <= self.now:
            return
        self._copies_end += seconds
        for each in self._flights:
            if each.account == COPY and each.end > self.now:
                each.begin += seconds
                each.end += seconds
