"""The memory of a compiled program on each device."""

import jax


def program_memory(compiled: jax.stages.Compiled) -> dict[str, int | None]:
    """Bytes per device that a compiled program needs, as its compiler planned them.

    Returns:
        `argument_bytes`, `output_bytes`, `temp_bytes`; `alias_bytes`, the part of the
        outputs that reuses donated arguments; `code_bytes`; `host_bytes`, all of these
        in host memory; and `peak_bytes`, the most in use at any time, None on a
        backend that does not report it.

    Raises:
        ValueError: the backend does not analyse memory at all.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError(
            "compiled.memory_analysis() returned None: this backend does not report "
            "memory; compile for CPU, GPU or a TPU topology"
        )
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        + stats.host_temp_size_in_bytes
        - stats.host_alias_size_in_bytes
    )
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
        "host_bytes": host,
        "peak_bytes": getattr(stats, "peak_memory_in_bytes", None),
    }
