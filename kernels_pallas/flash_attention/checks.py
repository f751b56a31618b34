"""What flash attention refuses, and what it says then."""

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.flash_attention.inputs import Inputs

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def check_qkv(q: Array, k: Array, v: Array) -> None:
    """Raises ValueError on shapes and TypeError on dtypes of self-attention."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} should be q [B, S, H, K] and "
            "k, v [B, S, G, K]"
        )
    (batch, length, heads, head_dim), groups = q.shape, k.shape[2]
    if k.shape != (batch, length, groups, head_dim):
        raise ValueError(
            f"q {q.shape} and k {k.shape} differ in more than their heads; self-"
            "attention takes the same B, S and K in q [B, S, H, K] and k [B, S, G, K]"
        )
    if min(q.shape) < 1 or groups < 1 or heads % groups:
        raise ValueError(
            f"q {q.shape} has {heads} heads and k {k.shape} has {groups}; the query "
            "heads should be a multiple of the key heads, and no dim empty"
        )
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        names = [dtype.name for dtype in DTYPES]
        raise TypeError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; give all three the "
            f"same dtype, one of {names}"
        )


def check_segments(q: Array, segments: Array | None) -> None:
    """Raises if `segments` are not int32 [B, S]."""
    if segments is None:
        return
    if segments.shape != q.shape[:2]:
        raise ValueError(
            f"segments {segments.shape} should be [B, S] = {q.shape[:2]}, one "
            "number per token"
        )
    if segments.dtype != jnp.int32:
        raise TypeError(f"segments are {segments.dtype}; give int32")


def check_per_head(inputs: Inputs) -> None:
    """Raises if slopes or sinks are not float32 [H]."""
    heads = inputs.q.shape[2]
    named: Iterable[tuple[str, Array | None]] = (
        ("slopes", inputs.slopes),
        ("sinks", inputs.sinks),
    )
    for name, x in named:
        if x is not None and x.shape != (heads,):
            raise ValueError(
                f"{name} {x.shape} should be [H] = {(heads,)}, one number per head"
            )
        if x is not None and x.dtype != jnp.float32:
            raise TypeError(f"{name} are {x.dtype}; give float32")


def check_window(window: Array | int | None) -> None:
    """Raises ValueError on a window that is no int from 1 on, and no int32 scalar."""
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"window={window}; give at least 1, or None for no window")
    elif window is not None and (window.shape != () or window.dtype != jnp.int32):
        raise ValueError(
            f"window is {window.dtype} {window.shape}; give an int, or an int32 scalar"
        )


def check_softcap(softcap: float | None) -> None:
    """Raises ValueError unless `softcap` is None or above 0."""
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"softcap={softcap}; give the bound of the scores, above 0, or None"
        )
