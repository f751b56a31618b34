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
from kernels_pallas.flash_attention import flash_attention, tpu

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


CASES = [
    _case("forward", forward, structs(768, 128), blocks=2),
    _case(
        "forward, head dim 64, segments", forward, structs(768, 64, segments=True), 2
    ),
    _case("forward, 8192 tokens", forward, structs(8192, 128), blocks=2),
    _case("forward and backward", backward, structs(768, 128), blocks=6),
]
