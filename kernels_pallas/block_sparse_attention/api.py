"""Block-sparse attention: signature, checks, dispatch and gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.arrays import vary_like
from kernels_pallas.block_sparse_attention import reference, tpu, xla
from kernels_pallas.block_sparse_attention.inputs import Inputs, Options
from kernels_pallas.block_sparse_attention.pattern import Mask, Pattern
from kernels_pallas.flash_attention.checks import check_qkv, check_segments
from kernels_pallas.flash_attention.reference import MASKED

CHECKPOINT_NAME = "block_sparse_attention"
"""Name of the output and its lse for `jax.checkpoint_policies`."""

NAME = "block_sparse_attention"


def block_sparse_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    layout: Bool[np.ndarray, "P N N"],
    *,
    block: int,
    causal: bool = True,
    segments: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    first_head: Int[Array, ""] | int = 0,
    implementation: str | None = None,
) -> Float[Array, "B S H K"]:
    """Self-attention over the blocks that a layout lists, exact to the token.

    Query i sees key j in head h if `layout[first_head + h, i // block, j // block]`, if
    `i >= j` or `causal` is False, and if both are of one segment. A query that sees
    nothing gets zeros. Query head h reads key head `h // (H / G)`. Scores, softmax and
    sums are float32, the inputs of matmuls have the dtype of `q`. Work and memory go
    with the blocks that are listed. Works inside `shard_map` on local arrays (it sends
    nothing), and under `jit`, `grad`, `checkpoint`, `scan` and `vmap`.

    Args:
        q: queries, float32, bfloat16 or float16.
        k, v: keys and values of the same dtype; G divides H.
        layout: a numpy array, known when the program is traced, N = ceil(S / block);
            `layouts` has constructors. P = 1: all heads have the same.
        block: tokens in a block of the layout.
        causal: whether no query sees a later token, whatever the layout says.
        segments: int32, the document of each token; None: one document.
        scale: factor of the scores, K**-0.5 by default.
        first_head: which head of the layout the first of `q` has, a multiple of H / G.
            Where heads are split over devices, `jax.lax.axis_index(axis) * H` with
            the layout of all of them.
        implementation: "tpu" (Pallas), "xla" (plain JAX) or "reference" (plain JAX,
            whole scores); None takes "tpu" where the program is compiled for a TPU and
            the kernels can run, and "xla" elsewhere.

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, or one that
            cannot run with this layout.
        TypeError: unsupported or differing dtypes, a layout that is not known.
    """
    out, _ = block_sparse_attention_with_lse(
        q,
        k,
        v,
        layout,
        block=block,
        causal=causal,
        segments=segments,
        scale=scale,
        first_head=first_head,
        implementation=implementation,
    )
    return out


def block_sparse_attention_with_lse(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    layout: Bool[np.ndarray, "P N N"],
    *,
    block: int,
    causal: bool = True,
    segments: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    first_head: Int[Array, ""] | int = 0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S"]]:
    """`block_sparse_attention` and the log of its normaliser, both differentiable.

    Returns:
        the output, and lse = log(sum(exp(score))) per head and query, float32; about
        -2.4e38, so that `exp(lse)` is 0, for a query that sees nothing.

    Raises:
        as `block_sparse_attention`.
    """
    check_qkv(q, k, v)
    check_segments(q, segments)
    pattern = _pattern(layout)
    _check_layout(q, k, pattern, block, first_head)
    options = Options(
        Mask(pattern, block, q.shape[1], bool(causal)),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
    )
    inputs = Inputs(q, k, v, segments, jnp.asarray(first_head, jnp.int32))
    _check_implementation(options, implementation, inputs)
    arrays = jax.tree.leaves(inputs)
    inputs = jax.tree.map(lambda x: vary_like(x, *arrays), inputs)
    if implementation == "reference":
        return reference.attention(options, inputs)
    return _attend(options, implementation, inputs)


def _candidates(options: Options, inputs: Inputs, name: str) -> dict[str, Any]:
    """`forward` or `backward` of each implementation, or why it cannot run."""
    refused = tpu.refusal(options, inputs)
    own = functools.partial(getattr(tpu, name), options)
    return {
        "tpu": own if refused is None else refused,
        "xla": functools.partial(getattr(xla, name), options),
    }


def _check_implementation(
    options: Options, implementation: str | None, inputs: Inputs
) -> None:
    candidates = _candidates(options, inputs, "forward")
    candidates["reference"] = reference.attention
    dispatch.check(NAME, implementation, candidates)


def _attention(
    options: Options, implementation: str | None, inputs: Inputs
) -> tuple[Array, Array]:
    """Output and lse, by the chosen implementation."""
    candidates = _candidates(options, inputs, "forward")
    return dispatch.run(NAME, implementation, candidates, inputs)


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
    # So that exp(MASKED - lse) is 0 for a query that sees nothing.
    lse = jnp.where(lse > MASKED / 2, lse, 0.0)
    candidates = _candidates(options, inputs, "backward")
    arguments = (inputs, lse, delta, d_out)
    dq, dk, dv = dispatch.run(NAME, implementation, candidates, *arguments)
    return (Inputs(dq, dk, dv, None, None),)  # pyright: ignore


_attend = jax.custom_vjp(_attention, nondiff_argnums=(0, 1))
_attend.defvjp(_attend_forward, _attend_backward)


def _pattern(layout: Any) -> Pattern:
    if isinstance(layout, Tracer):
        raise TypeError(
            "the layout is being traced; give a numpy array, which is the same in all "
            "calls of the program, and `first_head` where devices have different heads"
        )
    layout = np.asarray(layout)
    if layout.ndim != 3 or layout.shape[1] != layout.shape[2]:
        raise ValueError(f"layout {layout.shape} should be [P, N, N]")
    return Pattern.of(layout if layout.dtype == bool else layout != 0)


def _check_layout(
    q: Array, k: Array, pattern: Pattern, block: int, first_head: Array | int
) -> None:
    length, heads, rows = q.shape[1], q.shape[2], len(pattern.of_head)
    count = -(-length // block) if block > 0 else 0
    if pattern.count != count:
        raise ValueError(
            f"a layout of {pattern.count} x {pattern.count} blocks of {block} tokens "
            f"does not fit {length} tokens; give ceil(S / block) blocks a side, {count}"
        )
    if rows > 1 and rows % heads:
        raise ValueError(
            f"the layout has {rows} heads and q {q.shape} has {heads}; give a "
            f"layout of 1 or {heads} heads, or of a multiple with first_head"
        )
    if not isinstance(first_head, int):
        return
    repeats = heads // k.shape[2]
    last = max(rows - heads, 0)
    if not 0 <= first_head <= last or first_head % repeats:
        raise ValueError(
            f"first_head={first_head}; give a multiple of the {repeats} query heads of "
            f"a key head, from 0 to {last}"
        )
