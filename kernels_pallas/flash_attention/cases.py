"""Flash attention at the sizes that `python -m kernels_pallas.check` compiles.

Blocks of 256 tokens where a small size says enough, of 1024 (as 8192 tokens have) once.
Masked and unmasked pairs of blocks are separate code, and both are counted: the cycles
are to be compared with themselves, and are no time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.check.case import Case
from kernels_pallas.flash_attention import flash_attention, gpu, tpu
from kernels_pallas.flash_attention.inputs import Inputs, Options

Structs = tuple[Any, ...]


def forward(
    q: Array, k: Array, v: Array, segments: Array | None, *, implementation: str
) -> Array:
    """The output."""
    return flash_attention(q, k, v, segments=segments, implementation=implementation)


def backward(
    q: Array, k: Array, v: Array, segments: Array | None, *, implementation: str
) -> tuple[Array, ...]:
    """Gradients, with the forward pass that they need."""

    def total(q: Array, k: Array, v: Array) -> Array:
        out = forward(q, k, v, segments, implementation=implementation)
        return out.astype(jnp.float32).sum()

    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)


def structs(length: int, head_dim: int, segments: bool = False) -> Structs:
    """q, k, v of one sequence, 4 heads on 1, bfloat16; then segments, or None."""
    shapes = [(1, length, heads, head_dim) for heads in (4, 1, 1)]
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if segments else None
    return (*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes), ids)


def _case(
    name: str, function: Callable[..., Any], arguments: Structs, blocks: int
) -> Case:
    """With the bytes of one step of each kernel: `blocks`, that the next replaces."""
    length, head_dim = arguments[1].shape[1::2]
    block = tpu.block_size(length, head_dim, jnp.bfloat16)
    return Case(
        name,
        "tpu",
        functools.partial(function, implementation="tpu"),
        arguments,
        hbm_bytes=blocks * block * head_dim * 2,
    )


def gpu_forward(
    q: Array, k: Array, v: Array, segments: Array | None, **given: Any
) -> tuple[Array, Array]:
    """The output and lse of the GPU kernel; options are those of the inputs."""
    options, inputs = _gpu_inputs(q, k, v, segments, **given)
    return gpu.forward(options, inputs)


def gpu_backward(
    q: Array, k: Array, v: Array, segments: Array | None, **given: Any
) -> tuple[Array, ...]:
    """The gradients of the GPU kernels alone."""
    options, inputs = _gpu_inputs(q, k, v, segments, **given)
    batch, length, heads, _ = q.shape
    numbers = jnp.zeros((batch, heads, length), jnp.float32)
    return gpu.backward(options, inputs, numbers, numbers, q)


def _gpu_inputs(
    q: Array, k: Array, v: Array, segments: Array | None, **given: Any
) -> tuple[Options, Inputs]:
    slopes = given.pop("slopes", None)
    if slopes is not None:
        slopes = jnp.full(q.shape[2], slopes, jnp.float32)
    options = Options(q.shape[3] ** -0.5, given.pop("window", None), **given)
    return options, Inputs(q, k, v, segments, None, slopes)


def _gpu_case(
    name: str, function: Callable[..., Any], arguments: Structs, **given: Any
) -> Case:
    """Instructions are counted per score of 64 queries with a block of keys."""
    head_dim = arguments[0].shape[3]
    block = 64 if function is gpu_backward else gpu.block_size(head_dim)
    bound = functools.partial(function, **given)
    return Case(name, "gpu", bound, arguments, weights=64 * block)


CASES = [
    _case("forward", forward, structs(768, 128), blocks=2),
    _case(
        "forward, head dim 64, segments", forward, structs(768, 64, segments=True), 2
    ),
    _case("forward, 8192 tokens", forward, structs(8192, 128), blocks=2),
    _case("forward and backward", backward, structs(768, 128), blocks=6),
    _gpu_case("forward", gpu_forward, structs(768, 128)),
    _gpu_case("forward, head dim 64", gpu_forward, structs(768, 64)),
    _gpu_case("forward, head dim 256", gpu_forward, structs(768, 256)),
    _gpu_case("forward, segments", gpu_forward, structs(768, 128, segments=True)),
    _gpu_case("forward, ALiBi", gpu_forward, structs(768, 128), slopes=0.5),
    _gpu_case("forward, soft-cap", gpu_forward, structs(768, 128), softcap=30.0),
    _gpu_case("forward, window", gpu_forward, structs(768, 128), window=200),
    _gpu_case("backward", gpu_backward, structs(768, 128)),
    _gpu_case("backward, head dim 64", gpu_backward, structs(768, 64)),
]
