"""The text of a compiled program, from compilers that jaxlib cannot print, too.

`compiled.as_text()` hands the compiler's program to jaxlib, which refuses forms that it
does not know: a libtpu newer than the one that jaxlib was built with writes
asynchronous operations so (libtpu 0.0.52 under jax 0.10.2, for TPU7x always, for v5p
and v6e in larger programs). The compiler itself writes any program down when asked to
(`compiler.compile_lowered`).
"""

import jax


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
            "jaxspeed.plan.compile_lowered(lowered), or install the libtpu that "
            "this jax was built with: pip install 'jax[tpu]'"
        ) from error
