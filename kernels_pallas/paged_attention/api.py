"""Paged attention: signature, validation and dispatch."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.arrays import vary_like
from kernels_pallas.paged_attention import reference, tpu, tpu_pages, xla
from kernels_pallas.paged_attention.inputs import Inputs, Options

NAME = "paged_attention"
NO_GPU = "there is no GPU kernel of it yet; take 'xla'"
DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16)))
STORED = tuple(map(jnp.dtype, (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)))
SUBLANES = 8
"""Rows of a tile of 32-bit numbers; narrower ones have proportionally more."""


def paged_attention(
    q: Float[Array, "T H K"],
    pages: Array,
    table: Int[Array, "S L"],
    lengths: Int[Array, " S"],
    starts: Int[Array, " S+1"],
    *,
    new: tuple[Float[Array, "T G K"], Float[Array, "T G K"]] | None = None,
    scales: Float[Array, "G 2"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T H K"], Array]:
    """Causal attention of several sequences to keys and values in pages.

    Queries of all sequences lie one after the other (Kwon et al., 2023,
    "PagedAttention"): those of sequence s from `starts[s]` to `starts[s + 1]`, any
    number, none too. They are its last tokens: the last of them is at position
    `lengths[s] - 1`. One call so serves prompts, parts of prompts and single tokens.
    Query head h reads key head `h // (H / G)`. Sums are float32. No gradient.

    Args:
        q: float32 or bfloat16. Rows after the last sequence give zeros.
        pages: the pool [P, G, 2, page, K] of `pages_shape`, in the dtype of q, int8,
            float8_e4m3fn or float8_e5m2; page is a multiple of 8 for float32, 16 for
            bfloat16 and 32 for the others. Donate it to `jit` where `new` is given.
        table: int32, the pages of each sequence in order; what is after the page of
            its last token is not read.
        lengths: int32, tokens of each sequence, those of this call included.
        starts: int32, not decreasing, the first is 0.
        new: keys and values of the queries' tokens, to be put into the pages before;
            None: they are there already. A page with new tokens is of one sequence.
        scales: float32, what the numbers in the pages are multiplied with, for each
            key head for keys and for values; None: 1. New tokens are divided by them.
        window: a query sees itself and the `window - 1` tokens before it; None: all.
        scale: factor of the scores, K**-0.5 by default.
        implementation: "tpu" (Pallas), "xla" (plain JAX, blockwise) or "reference"
            (plain JAX, all keys at once); None takes "tpu" where the program is
            compiled for a TPU and "xla" elsewhere.

    Returns:
        the output, and the pages, changed if `new` is given.

    Raises:
        ValueError: shapes that do not fit, a window below 1, an unknown implementation.
        TypeError: unsupported dtypes.
    """
    _check(q, pages, table, window)
    if scales is None:
        scales = jnp.ones((pages.shape[1], 2), jnp.float32)
    inputs = _inputs(Inputs(q, pages, scales, table, lengths, starts))
    if new is not None:
        inputs = _written(inputs, new, implementation)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = Options(factor, window)
    candidates = {
        "tpu": functools.partial(tpu.attention, options),
        "gpu": NO_GPU,
        "xla": functools.partial(xla.attention, options),
        "reference": functools.partial(reference.attention, options),
    }
    return dispatch.run(NAME, implementation, candidates, inputs), inputs.pages


def write_pages(
    pages: Array,
    new: tuple[Float[Array, "T G K"], Float[Array, "T G K"]],
    table: Int[Array, "S L"],
    lengths: Int[Array, " S"],
    starts: Int[Array, " S+1"],
    *,
    scales: Float[Array, "G 2"] | None = None,
    implementation: str | None = None,
) -> Array:
    """The pages with new keys and values, as `paged_attention` with `new` writes them.

    Raises:
        as `paged_attention`.
    """
    keys, _ = new
    _check(keys, pages, table, None)
    if scales is None:
        scales = jnp.ones((pages.shape[1], 2), jnp.float32)
    inputs = _inputs(Inputs(keys, pages, scales, table, lengths, starts))
    return _written(inputs, new, implementation).pages


def _written(
    inputs: Inputs, new: tuple[Array, Array], implementation: str | None
) -> Inputs:
    keys, values = new
    tokens, _, head_dim = inputs.q.shape
    shape = (tokens, inputs.groups, head_dim)
    if keys.shape != shape or values.shape != shape:
        raise ValueError(
            f"new keys {keys.shape} and values {values.shape} should be [T, G, K] = "
            f"{shape}"
        )
    if keys.dtype not in DTYPES or keys.dtype != values.dtype:
        raise TypeError(
            f"new keys and values are {keys.dtype} and {values.dtype}; give both "
            "float32 or bfloat16"
        )
    both = vary_like(jnp.stack([keys, values], axis=2), inputs.pages)
    candidates = {
        "tpu": tpu_pages.write,
        "gpu": NO_GPU,
        "xla": reference.write,
        "reference": reference.write,
    }
    pages = dispatch.run(NAME, implementation, candidates, inputs, both)
    return Inputs(
        inputs.q, pages, inputs.scales, inputs.table, inputs.lengths, inputs.starts
    )


def _inputs(inputs: Inputs) -> Inputs:
    """Checked, and all marked as varying along the mesh axes that any of them does."""
    sequences, groups = inputs.table.shape[0], inputs.groups
    for name, shape, dtype in (
        ("scales", (groups, 2), jnp.float32),
        ("lengths", (sequences,), jnp.int32),
        ("starts", (sequences + 1,), jnp.int32),
        ("table", inputs.table.shape, jnp.int32),
    ):
        x = getattr(inputs, name)
        if x.shape != shape:
            raise ValueError(
                f"{name} {x.shape} should be {shape} for pages {inputs.pages.shape} "
                f"and a table {inputs.table.shape}"
            )
        if x.dtype != dtype:
            raise TypeError(f"{name} are {x.dtype}; give {jnp.dtype(dtype).name}")
    arrays = [getattr(inputs, field) for field in Inputs.__dataclass_fields__]
    return Inputs(*(vary_like(x, *arrays) for x in arrays))


def _check(q: Array, pages: Array, table: Array, window: int | None) -> None:
    if q.ndim != 3 or pages.ndim != 5 or table.ndim != 2 or pages.shape[2] != 2:
        raise ValueError(
            f"q {q.shape}, pages {pages.shape} and table {table.shape} should be "
            "q [T, H, K], pages [P, G, 2, page, K] and table [S, L]"
        )
    if min(*q.shape, *pages.shape, *table.shape) < 1:
        raise ValueError(
            f"q {q.shape}, pages {pages.shape} or table {table.shape} is empty"
        )
    if q.shape[2] != pages.shape[4] or q.shape[1] % pages.shape[1]:
        raise ValueError(
            f"q {q.shape} and pages {pages.shape} should have the same K, and H = "
            f"{q.shape[1]} should be a multiple of G = {pages.shape[1]}"
        )
    if q.dtype not in DTYPES or pages.dtype not in (q.dtype, *STORED):
        allowed = [dtype.name for dtype in STORED]
        raise TypeError(
            f"q is {q.dtype} and pages are {pages.dtype}; give q in float32 or "
            f"bfloat16, and pages in the same or one of {allowed}"
        )
    rows = SUBLANES * 4 // pages.dtype.itemsize
    if pages.shape[3] % rows:
        raise ValueError(
            f"pages {pages.shape} of {pages.dtype} have {pages.shape[3]} tokens each; "
            f"give a multiple of {rows}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window}; give at least 1, or None for no window")
