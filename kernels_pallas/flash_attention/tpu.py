"""Flash attention on TPU (Pallas Mosaic): three kernels and how they are called.

Forward, query gradient, and key and value gradient (Dao, 2023, "FlashAttention-2"; by
the block pairs of `schedule`). Keys and values are read per key head, never
repeated. Float32 inputs are multiplied as `jax.default_matmul_precision` says.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.arrays import pad_dim
from kernels_pallas.flash_attention import tpu_kernels
from kernels_pallas.flash_attention.inputs import Inputs, Options
from kernels_pallas.flash_attention.schedule import Blocks, Schedule
from kernels_pallas.flash_attention.tpu_grid import Grid
from kernels_pallas.flash_attention.tpu_kernels import LANES, Given
from kernels_pallas.flash_attention.tpu_scores import Masking, Scalars

BLOCKS = (1024, 512, 256)
"""Block sizes to choose from beside the smallest, 128.

The larger, the less of a step is latency. Cycles of the three kernels per 1024 x 1024
scores, K = 128, nothing masked, in the compiler's final schedule: on v5p 23.2k with
512 and 20.5k with 1024 (18.4k at the peak), on v6e 14.7k and 11.4k (9.2k at the peak:
half of its 256-wide matrix unit is idle at K = 128).
"""


def forward(
    options: Options, inputs: Inputs
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S"]]:
    """Attention and the log of the sum of exponentiated scores, float32."""
    problem = _Problem(options, inputs)
    rows, head_dim = problem.blocks.query, problem.head_dim
    out, lse = problem.call(
        _Kernel("flash_attention_forward", tpu_kernels.forward, True, matmuls=2),
        problem.given(),
        outputs=["query", "per_query"],
        sums=[(rows, LANES), (rows, LANES), (rows, head_dim)],
    )
    return problem.unpad(out), lse[:, :, 0, : problem.length]


def backward(
    options: Options,
    inputs: Inputs,
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    d_out: Float[Array, "B S H K"],
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v; `delta` is the part of dscore that a row shares."""
    problem = _Problem(options, inputs)
    rows, columns = problem.blocks.query, problem.blocks.key
    head_dim = problem.head_dim
    given = dataclasses.replace(
        problem.given(),
        d_out=problem.pad(d_out),
        lse=problem.pad_rows(lse),
        delta=problem.pad_rows(delta),
    )
    (dq,) = problem.call(
        _Kernel("flash_attention_dq", tpu_kernels.query_gradient, True, matmuls=3),
        given,
        outputs=["query"],
        sums=[(rows, head_dim), (rows, LANES), (rows, LANES)],
    )
    dk, dv = problem.call(
        _Kernel("flash_attention_dkv", tpu_kernels.key_gradient, False, matmuls=4),
        given,
        outputs=["key", "key"],
        sums=[(columns, head_dim), (columns, head_dim)],
    )
    return problem.unpad(dq), problem.unpad(dk), problem.unpad(dv)


def block_size(length: int, head_dim: int, dtype: Any) -> int:
    """Tokens in a block of queries, and of keys.

    Large, unless padding to a multiple would waste an eighth. Rows over 512 bytes do
    not fit in 16 MiB of VMEM with blocks of 1024, scores and accumulators beside them.
    """
    row = head_dim * jnp.dtype(dtype).itemsize
    padded = math.ceil(length / LANES) * LANES
    for size in BLOCKS:
        fits = row <= 512 or size <= 512
        if fits and math.ceil(padded / size) * size <= padded * 9 / 8:
            return size
    return LANES


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel body, and how many matmuls it has per pair of blocks."""

    name: str
    body: Callable[..., None]
    by_query: bool
    matmuls: int


@dataclasses.dataclass(frozen=True)
class _Problem:
    """One call: padded to whole blocks, heads before tokens.

    Arrays have one of five layouts: `query` [B, H, S, K], `key` [B, G, S, K],
    `per_query` [B, H, 1, S], `query_marks` and `key_marks` [B, 1, S].
    """

    options: Options
    inputs: Inputs

    @property
    def length(self) -> int:
        """Tokens before padding."""
        return self.inputs.q.shape[1]

    @property
    def head_dim(self) -> int:
        """K."""
        return self.inputs.q.shape[3]

    @property
    def dtype(self) -> Any:
        """That of the matmuls: Mosaic has none for float16."""
        given = self.inputs.q.dtype
        return jnp.dtype(jnp.float32) if given == jnp.float16 else given

    @property
    def blocks(self) -> Blocks:
        """How the sequence is cut."""
        size = block_size(self.length, self.head_dim, self.dtype)
        padded = math.ceil(self.length / size) * size
        options = self.options
        return Blocks(padded, size, size, options.window, options.causal)

    def pad(self, x: Array) -> Array:
        """[B, S, H, K] as [B, H, padded S, K]."""
        x = x.astype(self.dtype).swapaxes(1, 2)
        return pad_dim(x, 2, self.blocks.length)

    def unpad(self, x: Array) -> Array:
        """[B, H, padded S, K] as [B, S, H, K] in the caller's dtype."""
        return x[:, :, : self.length].swapaxes(1, 2).astype(self.inputs.q.dtype)

    def pad_rows(self, x: Array) -> Array:
        """[B, H, S] as [B, H, 1, padded S]."""
        return pad_dim(x, 2, self.blocks.length)[:, :, None]

    def given(self) -> Given:
        """What the forward kernel reads; the others need more."""
        inputs, marks = self.inputs, ()
        if inputs.segments is not None:
            marks = (pad_dim(inputs.segments, 1, self.blocks.length)[:, None],)
        q, k, v = self.pad(inputs.q), self.pad(inputs.k), self.pad(inputs.v)
        return Given(q, k, v, marks, marks)

    def call(
        self,
        kernel: _Kernel,
        given: Given,
        *,
        outputs: list[str],
        sums: list[tuple[int, int]],
    ) -> Any:
        """Runs `kernel`.

        Args:
            kernel: which one.
            given: what it reads.
            outputs: layouts of the results.
            sums: shapes of the float32 accumulators.
        """
        grid = self._grid(kernel.by_query)
        has_segments = self.inputs.segments is not None
        rule = Masking(grid, self.options, self.length, has_segments)
        specs, layouts = _specs(grid, self.head_dim), _layouts(given)
        columns = [(sums[0][0], LANES)] * len(given.query_marks)
        moved = [*jax.tree.leaves(layouts), *outputs]
        run = pl.pallas_call(
            functools.partial(kernel.body, rule),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=grid.shape,
                in_specs=[jax.tree.map(specs.get, layouts)],
                out_specs=[specs[name] for name in outputs],
                scratch_shapes=[
                    tuple(pltpu.VMEM(shape, jnp.float32) for shape in sums),
                    tuple(pltpu.VMEM(shape, jnp.int32) for shape in columns),
                ],
            ),
            out_shape=[self._struct(name) for name in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=grid.semantics),
            cost_estimate=_cost(kernel, grid, self.head_dim, self.dtype, moved),
            name=kernel.name,
        )
        return run(self._scalars(), given)

    def _grid(self, by_query: bool) -> Grid:
        batch, _, heads, _ = self.inputs.q.shape
        window, groups = self.inputs.window, self.inputs.k.shape[2]
        dynamic = window is not None and self.options.window is None
        schedule = Schedule(self.blocks, by_query)
        return Grid(schedule, batch, heads, groups, dynamic)

    def _scalars(self) -> Scalars:
        inputs = self.inputs
        window = None
        if inputs.window is not None and self.options.window is None:
            window = inputs.window[None]
        return Scalars(window, inputs.slopes, inputs.sinks)

    def _struct(self, layout: str) -> jax.ShapeDtypeStruct:
        batch, _, heads, head_dim = self.inputs.q.shape
        groups, length = self.inputs.k.shape[2], self.blocks.length
        shape, dtype = {
            "query": ((batch, heads, length, head_dim), self.dtype),
            "key": ((batch, groups, length, head_dim), self.dtype),
            "per_query": ((batch, heads, 1, length), jnp.float32),
        }[layout]
        varying = jax.typeof(self.inputs.q).manual_axis_type
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def _layouts(given: Given) -> Given:
    """The layout of each array of `given`, by name."""
    backward = given.d_out is not None
    return Given(
        "query",
        "key",
        "key",
        ("query_marks",) * len(given.query_marks),
        ("key_marks",) * len(given.key_marks),
        d_out="query" if backward else None,
        lse="per_query" if backward else None,
        delta="per_query" if backward else None,
    )


def _cost(
    kernel: _Kernel, grid: Grid, head_dim: int, dtype: Any, moved: list[str]
) -> pl.CostEstimate:
    """What the pairs of blocks that run compute, and move as `moved` layouts.

    A window that is not known before the kernel runs counts as none.
    """
    blocks = grid.schedule.blocks
    pairs = grid.batch * grid.heads * blocks.count
    scores = pairs * blocks.query * blocks.key
    wide = head_dim * jnp.dtype(dtype).itemsize
    query_bytes = {"query": wide, "per_query": 4, "query_marks": 4}
    key_bytes = {"key": wide, "key_marks": 4}
    queries = blocks.query * sum(query_bytes.get(name, 0) for name in moved)
    keys = blocks.key * sum(key_bytes.get(name, 0) for name in moved)
    # What is accumulated stays for a row of pairs, what it meets changes with each.
    if kernel.by_query:
        rows = grid.batch * grid.heads * (blocks.length // blocks.query)
        moved_bytes = rows * queries + pairs * keys
    else:
        rows = grid.batch * grid.groups * (blocks.length // blocks.key)
        moved_bytes = rows * keys + pairs * queries
    return pl.CostEstimate(
        flops=2 * kernel.matmuls * scores * head_dim,
        transcendentals=scores,
        bytes_accessed=moved_bytes,
    )


def _specs(grid: Grid, head_dim: int) -> dict[str, pl.BlockSpec]:
    """The blocks that a step reads or writes, for each layout."""
    blocks = grid.schedule.blocks
    query, key = blocks.query, blocks.key
    return {
        "query": grid.spec(
            (None, None, query, head_dim), lambda s: (s.batch, s.head, s.query, 0)
        ),
        "key": grid.spec(
            (None, None, key, head_dim), lambda s: (s.batch, s.group, s.key, 0)
        ),
        "per_query": grid.spec(
            (None, None, 1, query), lambda s: (s.batch, s.head, 0, s.query)
        ),
        "query_marks": grid.spec((None, 1, query), lambda s: (s.batch, 0, s.query)),
        "key_marks": grid.spec((None, 1, key), lambda s: (s.batch, 0, s.key)),
    }
