"""Compiler options of the training step, per kind of device.

Each is here because it changes the compiled ZeRO-3 step of Llama 3 8B for the better
(`jaxspeed bench overlap` compiles it with and without); everything else is the
compiler's default. On GPUs that is all: XLA hides 94% of the bytes of the 8B step on
eight H200 as it is; its latency hiding scheduler, asked for by name, changes nothing.
"""

from typing import Any

from jaxspeed.chips import chip_of

TPU = {
    # The scheduler takes every transfer for free of the others' load, so it finds a few
    # matmuls enough to hide all of a layer's shifts, late in the layer, where they
    # queue on the links. Told that computation takes a tenth of its time, it starts
    # them early and spreads them over the layer.
    "xla_lhs_output_fusion_latency_multiplier": 0.1,
    "xla_lhs_loop_fusion_latency_multiplier": 0.1,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "v5e": TPU,
    "v5p": TPU,
    # Gathers run on the SparseCore while the TensorCore computes; without it each stops
    # the step. tpu7x does so by default, v5e fuses gathers with matmuls by default,
    # v5p does neither (`comm.GATHERS_IN_SHIFTS`).
    "v6e": TPU | {"xla_tpu_enable_sparse_core_collective_offload_all_gather": True},
    "tpu7x": TPU,
}


def compiler_options(device: Any) -> dict[str, Any]:
    """Options to compile a training step with, for `jax.jit(compiler_options=...)`.

    Args:
        device: one of the mesh, attached or of a topology.
    """
    chip = chip_of(device)
    return dict(OPTIONS.get(chip.name, {})) if chip else {}
