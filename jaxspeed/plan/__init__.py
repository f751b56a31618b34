"""Planning ahead of time: what a training step needs, before there is a machine."""

from jaxspeed.plan.advice import Advice
from jaxspeed.plan.buffers import Buffer, Memory
from jaxspeed.plan.compiler import compile_lowered
from jaxspeed.plan.deepspeed_estimate import (
    DeepSpeedBytes,
    deepspeed_stage_2,
    deepspeed_stage_3,
)
from jaxspeed.plan.estimate import Estimate, estimate
from jaxspeed.plan.memory import program_memory
from jaxspeed.plan.report import Report, report
from jaxspeed.plan.search import Search, search
from jaxspeed.plan.text import text_of
from jaxspeed.plan.timeline import Timeline, timeline
from jaxspeed.plan.topology import num_devices, topology_devices
from jaxspeed.plan.traffic import (
    Collective,
    bytes_by_axis,
    collectives,
    summarise,
)

__all__ = [
    "Advice",
    "Buffer",
    "Collective",
    "DeepSpeedBytes",
    "Estimate",
    "Memory",
    "Report",
    "Search",
    "Timeline",
    "bytes_by_axis",
    "collectives",
    "compile_lowered",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
    "estimate",
    "num_devices",
    "program_memory",
    "report",
    "search",
    "summarise",
    "text_of",
    "timeline",
    "topology_devices",
]
