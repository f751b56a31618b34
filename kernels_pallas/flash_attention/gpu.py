"""Flash attention on GPU (Pallas Mosaic GPU, Hopper): how the kernels are called.

Verified: values and gradients in JAX's interpreter of such kernels, for every option,
except that it has no product with an operand in registers (`gpu_matmul.accumulate`);
and that the compiler makes machine code for sm_90a of it. Not verified: a run on a GPU.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels_pallas import compat
from kernels_pallas.arrays import pad_dim
from kernels_pallas.flash_attention import gpu_backward, gpu_forward
from kernels_pallas.flash_attention.gpu_kernel import ROWS, Kernel
from kernels_pallas.flash_attention.gpu_scores import LOG2_E, Scores
from kernels_pallas.flash_attention.inputs import Inputs, Options
from kernels_pallas.gpu_ring import COMPUTING

HEAD_DIMS = (64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float16)

TOKENS = COMPUTING * ROWS
"""Queries of a program."""


def reason(inputs: Inputs) -> str | None:
    """Why the kernels cannot run on these inputs, or None if they can."""
    if inputs.q.dtype not in DTYPES:
        return f"q is {inputs.q.dtype}; its matmuls are bfloat16 or float16"
    if inputs.q.shape[3] not in HEAD_DIMS:
        return f"the head dim of q {inputs.q.shape} is none of {HEAD_DIMS}"
    return None


def backward_reason(inputs: Inputs) -> str | None:
    """Why the backward kernels cannot run on these inputs, or None if they can."""
    if inputs.q.shape[3] > 128:
        return (
            f"the head dim of q {inputs.q.shape} is above 128, whose key and value "
            "gradients do not fit in a warpgroup's registers"
        )
    return reason(inputs)


def forward(
    options: Options, inputs: Inputs
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S"]]:
    """Attention and the log of the sum of exponentiated scores, float32."""
    batch, length, heads, head_dim = inputs.q.shape
    kernel = _kernel(options, inputs, block_size(head_dim))
    out, lse = _call(
        "forward",
        functools.partial(gpu_forward.body, kernel),
        inputs,
        operands(options, inputs, kernel.padded),
        outputs=[
            ((batch, kernel.padded, heads, head_dim), kernel.dtype),
            ((batch, heads, kernel.padded), jnp.float32),
        ],
        scratch=gpu_forward.scratch(kernel),
        grid=(heads, kernel.padded // TOKENS, batch),
        cost=_cost(kernel, inputs, matmuls=2),
    )
    return out[:, :length], lse[:, :, :length]


def backward(
    options: Options,
    inputs: Inputs,
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    d_out: Float[Array, "B S H K"],
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v; `delta` is the part of dscore that a row shares."""
    batch, length, heads, head_dim = inputs.q.shape
    kernel = _kernel(options, inputs, ROWS)
    padded, groups = kernel.padded, inputs.k.shape[2]
    arrays = operands(options, inputs, padded) | {
        "d_out": pad_dim(d_out.astype(kernel.dtype), 1, padded),
        "lse": pad_dim(lse * LOG2_E, 2, padded),
        "delta": pad_dim(delta, 2, padded),
    }
    query = ((batch, padded, heads, head_dim), kernel.dtype)
    key = ((batch, padded, groups, head_dim), kernel.dtype)
    (dq,) = _call(
        "dq",
        functools.partial(gpu_backward.query_body, kernel),
        inputs,
        arrays,
        outputs=[query],
        scratch=gpu_backward.query_scratch(kernel),
        grid=(heads, padded // TOKENS, batch),
        cost=_cost(kernel, inputs, matmuls=3),
    )
    dk, dv = _call(
        "dkv",
        functools.partial(gpu_backward.key_body, kernel),
        inputs,
        arrays,
        outputs=[key, key],
        scratch=gpu_backward.key_scratch(kernel),
        grid=(groups, padded // TOKENS, batch),
        cost=_cost(kernel, inputs, matmuls=4),
    )
    return dq[:, :length], dk[:, :length], dv[:, :length]


def _kernel(options: Options, inputs: Inputs, block: int) -> Kernel:
    _, length, heads, head_dim = inputs.q.shape
    return Kernel(
        Scores(options, length),
        math.ceil(length / TOKENS) * TOKENS,
        head_dim,
        heads // inputs.k.shape[2],
        inputs.q.dtype,
        inputs.segments is not None,
        block,
        stages=2,
    )


def _call(
    name: str,
    body: Callable[..., None],
    inputs: Inputs,
    arrays: dict[str, Array],
    *,
    outputs: list[tuple[tuple[int, ...], Any]],
    scratch: Any,
    grid: tuple[int, int, int],
    cost: pl.CostEstimate,
) -> Any:
    """Runs a kernel over heads, tiles and sequences."""
    varying = jax.typeof(inputs.q).manual_axis_type
    structs = [
        jax.ShapeDtypeStruct(*output, manual_axis_type=varying) for output in outputs
    ]
    run = compat.gpu_kernel(
        body,
        name=f"flash_attention_{name}",
        cost_estimate=cost,
        out_type=structs,
        scratch_types=[scratch],
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
    )
    return run(arrays)


def block_size(head_dim: int) -> int:
    """Keys in a block of the forward kernel: what registers and two buffers hold."""
    return 64 if head_dim == 256 else 128


def operands(options: Options, inputs: Inputs, padded: int) -> dict[str, Array]:
    """The arrays that there are, by name, padded along the tokens."""
    found = {name: pad_dim(getattr(inputs, name), 1, padded) for name in "qkv"}
    if inputs.segments is not None:
        found["segments"] = pad_dim(inputs.segments, 1, padded)
    if inputs.window is not None and options.window is None:
        found["window"] = inputs.window[None]
    for name in ("slopes", "sinks"):
        if getattr(inputs, name) is not None:
            found[name] = getattr(inputs, name)
    return found


def _cost(kernel: Kernel, inputs: Inputs, matmuls: int) -> pl.CostEstimate:
    """Of a kernel with so many matmuls of the scores' size.

    Every array is counted once, as the cache keeps what programs of one head share. A
    window that is not known before the kernel runs counts as none.
    """
    batch, length, heads, head_dim = inputs.q.shape
    options = kernel.scores.options
    seen = length * length // (2 if options.causal else 1)
    if options.window is not None:
        seen = min(seen, length * options.window * (1 if options.causal else 2))
    scores = batch * heads * seen
    moved = 2 * (inputs.q.size + inputs.k.size) * inputs.q.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * matmuls * scores * head_dim,
        transcendentals=scores,
        bytes_accessed=moved + 4 * batch * heads * length,
    )
