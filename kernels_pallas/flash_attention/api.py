"""Flash attention (Dao, 2023, "FlashAttention-2"): signature and dispatch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.arrays import vary_like
from kernels_pallas.devices import hopper_candidate
from kernels_pallas.flash_attention import gpu, reference, tpu, xla
from kernels_pallas.flash_attention.checks import (
    check_per_head,
    check_qkv,
    check_segments,
    check_softcap,
    check_window,
)
from kernels_pallas.flash_attention.inputs import Inputs, Options

CHECKPOINT_NAME = "flash_attention"
"""Name of the output and its lse for `jax.checkpoint_policies`."""

NAME = "flash_attention"
EVERYWHERE = {"tpu": tpu, "xla": xla}
"""Implementations that take every input; JAX differentiates `reference`."""


def flash_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    *,
    segments: Int[Array, "B S"] | None = None,
    window: Int[Array, ""] | int | None = None,
    slopes: Float[Array, " H"] | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B S H K"]:
    """Self-attention in memory that grows with S, not with S * S.

    Query i sees key j if `0 <= i - j < window` and both are of one segment; query head
    h reads key head `h // (H / G)`. Scores, softmax and sums are float32, the inputs
    of matmuls have the dtype of `q`. Works inside `shard_map` on local arrays (it
    sends nothing), and under `jit`, `grad`, `checkpoint`, `scan` and `vmap`.

    Args:
        q: queries, float32, bfloat16 or float16.
        k, v: keys and values of the same dtype; G divides H.
        segments: int32, the document of each token; None: one document.
        window: at least 1; None sees everything before. A Python int leaves the blocks
            outside of the window out of the program; a traced int32 scalar may differ
            between layers of a scan.
        slopes: float32, ALiBi (Press et al., 2022): `slopes[h] * |i - j|` is
            subtracted from the score. A constant: no gradient flows to it.
        scale: factor of the scores, K**-0.5 by default.
        causal: False lets query i also see later keys: `|i - j| < window`.
        softcap: above 0; a scaled score s becomes `softcap * tanh(s / softcap)`, before
            slopes and masks (Gemma 2, 2024). None leaves it.
        sinks: float32, a learned logit per head that takes part in the softmax and has
            no value (Xiao et al., 2024, "attention sinks"; as in gpt-oss), so that the
            weights of a query may sum to less than 1. Its gradient is computed.
        implementation: "tpu" (Pallas), "gpu" (Pallas, Hopper GPUs, 16-bit inputs),
            "xla" (plain JAX, blockwise) or "reference" (plain JAX, whole scores); None
            takes "tpu" where the program is compiled for a TPU, "gpu" where it is known
            to be for a Hopper GPU (`devices.device_kind`) and the inputs are those of
            that kernel, and "xla" elsewhere.

    Raises:
        ValueError: shapes that do not fit, a window below 1, a softcap not above 0, an
            unknown implementation, or one that cannot run and why ("gpu" differentiated
            with heads of 256 too).
        TypeError: unsupported or differing dtypes.
    """
    out, _ = flash_attention_with_lse(
        q,
        k,
        v,
        segments=segments,
        window=window,
        slopes=slopes,
        scale=scale,
        causal=causal,
        softcap=softcap,
        sinks=sinks,
        implementation=implementation,
    )
    return out


def flash_attention_with_lse(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    *,
    segments: Int[Array, "B S"] | None = None,
    window: Int[Array, ""] | int | None = None,
    slopes: Float[Array, " H"] | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S"]]:
    """`flash_attention` and the log of its normaliser, both differentiable.

    Attention over parts of the keys can be put together from the outputs of the parts,
    weighted by `exp(lse)` (ring attention).

    Returns:
        the output, and lse = log(sum(exp(score))) per head and query, float32; the sum
        counts the sink, so give the sinks with one part of the keys only.

    Raises:
        as `flash_attention`.
    """
    check_qkv(q, k, v)
    check_segments(q, segments)
    check_window(window)
    check_softcap(softcap)
    if isinstance(window, int) and window >= q.shape[1]:
        window = None
    if slopes is not None:
        slopes = lax.stop_gradient(slopes)
    options = Options(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window if isinstance(window, int) else None,
        causal=bool(causal),
        softcap=None if softcap is None else float(softcap),
    )
    if window is not None:
        # Kernels add it to a position, which int32 has to hold.
        window = jnp.minimum(jnp.asarray(window, jnp.int32), q.shape[1])
    inputs = Inputs(q, k, v, segments, window, slopes, sinks)
    check_per_head(inputs)
    _check_implementation(implementation, inputs)
    inputs = _vary_alike(inputs)
    if implementation == "reference":
        return reference.attention(options, inputs)
    return _attend(options, implementation, inputs)


def _vary_alike(inputs: Inputs) -> Inputs:
    """All of the arrays marked as varying along the mesh axes that any of them does.

    The kernels' gradients vary as their inputs do; what is marked here is summed over
    the added axes on the way back.
    """
    arrays = jax.tree.leaves(inputs)
    return jax.tree.map(lambda x: vary_like(x, *arrays), inputs)


def _attention(
    options: Options, implementation: str | None, inputs: Inputs
) -> tuple[Array, Array]:
    """Output and lse, by the chosen implementation."""
    forward: dict[str, Any] = {
        name: functools.partial(module.forward, options)
        for name, module in EVERYWHERE.items()
    }
    forward["gpu"] = hopper_candidate(
        implementation,
        inputs.q,
        gpu.reason(inputs),
        functools.partial(gpu.forward, options),
    )
    return dispatch.run(NAME, implementation, forward, inputs)


def _attend_forward(
    options: Options, implementation: str | None, inputs: Inputs
) -> tuple[tuple[Array, Array], Any]:
    out, lse = _attention(options, implementation, inputs)
    out = checkpoint_name(out, CHECKPOINT_NAME)
    lse = checkpoint_name(lse, CHECKPOINT_NAME)
    return (out, lse), (inputs, out, lse)


def _attend_backward(
    options: Options,
    implementation: str | None,
    residuals: tuple[Inputs, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Any]:
    inputs, out, lse = residuals
    d_out, d_lse = cotangents
    product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    # dscore = weight * (dweight - delta): a row's dlse adds to every dscore of it.
    delta = product.sum(axis=-1).swapaxes(1, 2) - d_lse
    backward: dict[str, Any] = {
        name: functools.partial(module.backward, options)
        for name, module in EVERYWHERE.items()
    }
    backward["gpu"] = hopper_candidate(
        implementation,
        inputs.q,
        gpu.backward_reason(inputs),
        functools.partial(gpu.backward, options),
    )
    arguments = (inputs, lse, delta, d_out)
    dq, dk, dv = dispatch.run(NAME, implementation, backward, *arguments)
    d_sinks = None
    if inputs.sinks is not None:
        # A sink is a key whose value is zero: dscore = weight * (0 - delta).
        weights = jnp.exp(inputs.sinks[:, None] - lse)
        d_sinks = -(weights * delta).sum(axis=(0, 2))
    return (Inputs(dq, dk, dv, None, None, None, d_sinks),)


_attend = jax.custom_vjp(_attention, nondiff_argnums=(0, 1))
_attend.defvjp(_attend_forward, _attend_backward)


def _check_implementation(implementation: str | None, inputs: Inputs) -> None:
    candidates: dict[str, Any] = {
        "tpu": tpu.forward,
        "gpu": gpu.reason(inputs) or gpu.forward,
        "xla": xla.forward,
        "reference": reference.attention,
    }
    dispatch.check(NAME, implementation, candidates)
