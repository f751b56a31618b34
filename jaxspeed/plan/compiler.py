"""Compiles a lowered program and keeps what the compiler writes about it.

XLA's option `xla_dump_to` makes any of its compilers (CPU, GPU, TPU) write the
optimized program, where each value lies in memory, and when it is alive. A program that
needs more memory than the chip has is refused, but written down all the same.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxspeed.plan.text import text_of

_REFUSED = re.compile(r"Ran out of memory|exceeds? (?:the )?available|out of memory")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZES = (
    re.compile(r"\((?P<used>[\d.]+)(?P<used_unit>[KMGT]?)B?\) exceeds available HBM "
               r"\((?P<limit>[\d.]+)(?P<limit_unit>[KMGT]?)B?\)"),
    re.compile(r"Used (?P<used>[\d.]+)(?P<used_unit>[KMGT]?)B? of "
               r"(?P<limit>[\d.]+)(?P<limit_unit>[KMGT]?)B?"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Refusal:
    """The compiler's answer to a program that is too large for its chip.

    Attributes:
        message: its first line.
        used_bytes, limit_bytes: what the program needs and what it may; None where the
            message does not say.
    """

    message: str
    used_bytes: int | None
    limit_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled program and what was written about it.

    Attributes:
        compiled: None if it was refused.
        refusal: why, if it was.
        text: the optimized HLO, scheduled.
        assignment: where each value lies: a `BufferAssignment` in XLA's text form.
        live_ranges: when each value is alive, in XLA's text form.
        seconds: that the compiler took.
    """

    compiled: jax.stages.Compiled | None
    refusal: Refusal | None
    text: str
    assignment: str
    live_ranges: str
    seconds: float


def compile_lowered(
    lowered: jax.stages.Lowered, compiler_options: Mapping[str, Any] | None = None
) -> Compilation:
    """Compiles a lowered program.

    Args:
        lowered: `jax.jit(f).lower(...)`.
        compiler_options: as for `lowered.compile`.

    Raises:
        jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
        UnreadableProgramError: neither the compiler nor jaxlib printed the program,
            which happens to one out of a persistent compilation cache.
    """
    compiled, refusal = None, None
    with tempfile.TemporaryDirectory(prefix="jaxspeed-plan-") as folder:
        dump: Any = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        start = time.perf_counter()
        try:
            compiled = lowered.compile(
                compiler_options={**(compiler_options or {}), **dump}
            )
        except jax.errors.JaxRuntimeError as error:
            refusal = _refusal(str(error))
            if refusal is None:
                raise
        seconds = time.perf_counter() - start
        text = _written(folder, "after_optimizations.txt")
        if not text and compiled is not None:
            text = text_of(compiled)
        return Compilation(
            compiled,
            refusal,
            text,
            _written(folder, "after_optimizations-buffer-assignment.txt"),
            _written(folder, "after_optimizations-live-range.txt"),
            seconds,
        )


def _written(folder: str, ending: str) -> str:
    """The longest file with this ending; helper programs are written down, too."""
    texts = [path.read_text() for path in pathlib.Path(folder).glob(f"*{ending}")]
    return max(texts, key=len, default="")


def _refusal(message: str) -> Refusal | None:
    """What a compiler's error says about memory; None if it is about something else."""
    if not message.startswith("RESOURCE_EXHAUSTED") and not _REFUSED.search(message):
        return None
    first = message.strip().splitlines()[0]
    for pattern in _SIZES:
        if found := pattern.search(message):
            used, limit = (
                int(float(found[name]) * _UNITS[found[f"{name}_unit"]])
                for name in ("used", "limit")
            )
            return Refusal(first, used, limit)
    return Refusal(first, None, None)
