"""The text of a compiled program, from compilers that jaxlib cannot print, too.

`compiled.as_text()` hands the compiler's program to jaxlib, which refuses forms that it
does not know: a libtpu newer than the one that jaxlib was built with writes
asynchronous operations so (libtpu 0.0.52 under jax 0.10.2, for TPU7x always, for v5p
and v6e in larger programs). The compiler itself prints any program when asked to by
its option `xla_dump_to`.
"""

import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax

_DUMPED = "*after_optimizations.txt"


class UnreadableProgramError(ValueError):
    """The text of a compiled program cannot be had."""


def text_of(program: jax.stages.Compiled | str) -> str:
    """The optimized HLO of a compiled program, or the text itself, unchanged.

    Raises:
        UnreadableProgramError: jaxlib cannot print what the compiler made.
    """
    if isinstance(program, str):
        return program
    try:
        return program.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise UnreadableProgramError(
            f"jaxlib cannot print this compiled program ({error}); compile it with "
            "jaxspeed.plan.compile_with_text(lowered), or install the libtpu that "
            "this jax was built with: pip install 'jax[tpu]'"
        ) from error


def compile_with_text(
    lowered: jax.stages.Lowered, compiler_options: Mapping[str, Any] | None = None
) -> tuple[jax.stages.Compiled, str]:
    """Compiles, and returns the program together with its optimized HLO.

    Args:
        lowered: `jax.jit(f).lower(...)`.
        compiler_options: as for `lowered.compile`.

    Raises:
        UnreadableProgramError: neither jaxlib nor the compiler printed it, which
            happens to a program out of a persistent compilation cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile({**(compiler_options or {}), **dump})
        try:
            return compiled, text_of(compiled)
        except UnreadableProgramError:
            texts = list(pathlib.Path(folder).glob(_DUMPED))
            if not texts:
                raise
            return compiled, texts[0].read_text()
