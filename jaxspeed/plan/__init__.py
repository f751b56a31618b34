"""Planning ahead of time: what a compiled program sends, and the memory it needs."""

from jaxspeed.plan.memory import program_memory
from jaxspeed.plan.traffic import (
    Collective,
    bytes_by_axis,
    collectives,
    summarise,
)

__all__ = [
    "Collective",
    "bytes_by_axis",
    "collectives",
    "program_memory",
    "summarise",
]
