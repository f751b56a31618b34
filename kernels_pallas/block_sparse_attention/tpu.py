"""Block-sparse attention on TPU (Pallas Mosaic): three kernels on lists of blocks.

The bodies are those of flash attention; here are the pairs of blocks that they visit
and their masks. Lists lie in scalar memory, one by query for the output and dq and one
by key for dk and dv, so that a grid step knows its blocks before they are fetched
(as in the splash attention kernels of JAX).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.arrays import vary_like
from kernels_pallas.block_sparse_attention import tiling
from kernels_pallas.block_sparse_attention.arrangement import Arrangement
from kernels_pallas.block_sparse_attention.inputs import Inputs, Options
from kernels_pallas.block_sparse_attention.lists import Lists, lists
from kernels_pallas.block_sparse_attention.tpu_grid import Grid, Scalars, block_specs
from kernels_pallas.block_sparse_attention.tpu_rule import Masking
from kernels_pallas.flash_attention import tpu_kernels
from kernels_pallas.flash_attention.tpu_kernels import LANES, Given


def refusal(options: Options, inputs: Inputs) -> str | None:
    """Why the kernels cannot run, or None."""
    repeats = inputs.q.shape[2] // inputs.k.shape[2]
    return tiling.refusal(options.mask, largest_block(inputs), repeats)


def largest_block(inputs: Inputs) -> int:
    """Tokens in a block that fits in VMEM, with scores and accumulators beside it."""
    row = inputs.q.shape[-1] * _dtype(inputs).itemsize
    return 1024 if row <= 512 else 512


def forward(
    options: Options, inputs: Inputs
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S"]]:
    """Attention and the log of the sum of exponentiated scores, float32."""
    problem = _Problem.of(options, inputs)
    rows = problem.queries.block
    out, lse = problem.call(
        _Kernel("forward", tpu_kernels.forward, by_query=True, matmuls=2),
        problem.given(),
        outputs=["query", "per_query"],
        sums=[(rows, LANES), (rows, LANES), (rows, problem.head_dim)],
    )
    return problem.output(out, problem.queries), problem.queries.restore(
        lse[:, :, 0], 2
    )


def backward(
    options: Options,
    inputs: Inputs,
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    d_out: Float[Array, "B S H K"],
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v; `delta` is the part of dscore that a row shares."""
    problem = _Problem.of(options, inputs)
    rows, columns = problem.queries.block, problem.keys.block
    head_dim = problem.head_dim
    given = dataclasses.replace(
        problem.given(),
        d_out=problem.operand(d_out, problem.queries),
        lse=problem.queries.arrange(lse, 2)[:, :, None],
        delta=problem.queries.arrange(delta, 2)[:, :, None],
    )
    (dq,) = problem.call(
        _Kernel("dq", tpu_kernels.query_gradient, by_query=True, matmuls=3),
        given,
        outputs=["query"],
        sums=[(rows, head_dim), (rows, LANES), (rows, LANES)],
    )
    dk, dv = problem.call(
        _Kernel("dkv", tpu_kernels.key_gradient, by_query=False, matmuls=4),
        given,
        outputs=["key", "key"],
        sums=[(columns, head_dim), (columns, head_dim)],
    )
    keys = problem.keys
    dk, dv = problem.output(dk, keys), problem.output(dv, keys)
    return problem.output(dq, problem.queries), dk, dv


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel body, and how many matmuls it has per pair of blocks."""

    name: str
    body: Callable[..., None]
    by_query: bool
    matmuls: int


@dataclasses.dataclass(frozen=True)
class _Problem:
    """One call: tokens arranged and padded to whole blocks, heads before tokens."""

    options: Options
    inputs: Inputs
    cell: int
    queries: Arrangement
    keys: Arrangement

    @classmethod
    def of(cls, options: Options, inputs: Inputs) -> "_Problem":
        repeats = inputs.q.shape[2] // inputs.k.shape[2]
        tiles = tiling.choose(options.mask, largest_block(inputs), repeats)
        assert tiles is not None
        length, cell = options.mask.length, tiles.cell
        queries = Arrangement(length, cell, tiles.query, tiles.query_order)
        keys = Arrangement(length, cell, tiles.key, tiles.key_order)
        return cls(options, inputs, cell, queries, keys)

    @property
    def head_dim(self) -> int:
        """K."""
        return self.inputs.q.shape[3]

    def operand(self, x: Array, arrangement: Arrangement) -> Array:
        """[B, S, H, K] as [B, H, padded S, K]."""
        return arrangement.arrange(x.astype(_dtype(self.inputs)).swapaxes(1, 2), 2)

    def output(self, x: Array, arrangement: Arrangement) -> Array:
        """[B, H, padded S, K] as [B, S, H, K] in the caller's dtype."""
        return arrangement.restore(x, 2).swapaxes(1, 2).astype(self.inputs.q.dtype)

    def given(self) -> Given:
        """What the forward kernel reads, but for its words; the others need more."""
        inputs, mask = self.inputs, self.options.mask
        reach, places = self.queries.positions(), self.keys.positions()
        if not mask.causal:
            reach = np.full_like(reach, mask.length - 1)
        query_marks, key_marks = [self._mark(reach)], [self._mark(places)]
        if inputs.segments is not None:
            query_marks.append(self.queries.arrange(inputs.segments, 1)[:, None])
            key_marks.append(self.keys.arrange(inputs.segments, 1)[:, None])
        return Given(
            self.operand(inputs.q, self.queries),
            self.operand(inputs.k, self.keys),
            self.operand(inputs.v, self.keys),
            tuple(query_marks),
            tuple(key_marks),
        )

    def _mark(self, numbers: np.ndarray) -> Array:
        return vary_like(jnp.asarray(numbers)[None, None], self.inputs.q)

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
            given: what it reads beside its words.
            outputs: layouts of the results.
            sums: shapes of the float32 accumulators.
        """
        listed = self._lists(kernel.by_query)
        words = vary_like(jnp.asarray(listed.words), self.inputs.q)
        given = dataclasses.replace(given, table=words)
        grid = self._grid(kernel.by_query, listed)
        blocks = self.queries.block, self.keys.block
        specs = block_specs(grid, *blocks, self.head_dim, listed.words.shape[2])
        layouts = _layouts(given)
        columns = [(sums[0][0], LANES)] * len(given.query_marks)
        run = pl.pallas_call(
            functools.partial(kernel.body, self._rule(grid, listed)),
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
            cost_estimate=self._cost(kernel, grid, listed),
            name=f"block_sparse_attention_{kernel.name}",
        )
        return run(self._scalars(grid, listed), given)

    def _lists(self, by_query: bool) -> Lists:
        repeats = self.inputs.q.shape[2] // self.inputs.k.shape[2]
        return lists(self.options.mask, largest_block(self.inputs), by_query, repeats)

    def _grid(self, by_query: bool, listed: Lists) -> Grid:
        batch, _, heads, _ = self.inputs.q.shape
        groups = self.inputs.k.shape[2]
        repeats = heads // groups
        alike = self.options.mask.pattern.alike(repeats)
        lines, width = len(listed.of_line), listed.places.shape[1]
        inner = repeats if alike and not by_query else 1
        return Grid(by_query, batch, heads, groups, lines, width, inner)

    def _rule(self, grid: Grid, listed: Lists) -> Masking:
        may_be_blind = listed.sees_nothing or self.inputs.segments is not None
        return Masking(grid, self.options.scale, self.cell, listed.kinds, may_be_blind)

    def _scalars(self, grid: Grid, listed: Lists) -> Scalars:
        first = self.inputs.first_head
        if not grid.by_query:
            first = lax.div(first, jnp.int32(grid.heads // grid.groups))

        def array(x: np.ndarray) -> Array:
            return vary_like(jnp.asarray(x.ravel()), self.inputs.q)

        listed_arrays = listed.of_line, listed.places, listed.marks
        return Scalars(first[None], *map(array, listed_arrays))

    def _struct(self, layout: str) -> jax.ShapeDtypeStruct:
        batch, _, heads, head_dim = self.inputs.q.shape
        groups, dtype = self.inputs.k.shape[2], _dtype(self.inputs)
        queries, keys = self.queries.padded, self.keys.padded
        shape, dtype = {
            "query": ((batch, heads, queries, head_dim), dtype),
            "key": ((batch, groups, keys, head_dim), dtype),
            "per_query": ((batch, heads, 1, queries), jnp.float32),
        }[layout]
        varying = jax.typeof(self.inputs.q).manual_axis_type
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)

    def _cost(self, kernel: _Kernel, grid: Grid, listed: Lists) -> pl.CostEstimate:
        """Of the listed pairs; where lists differ, of their mean over the layout."""
        query, key = self.queries.block, self.keys.block
        rows = grid.batch * grid.shape[1]
        pairs = rows * grid.inner * listed.pairs[listed.of_line].mean()
        scores = int(pairs * query * key)
        wide = self.head_dim * _dtype(self.inputs).itemsize
        inner = key * 2 * wide if kernel.by_query else query * (2 * wide + 8)
        outer_rows = self.queries.padded if kernel.by_query else self.keys.padded
        outer = rows * outer_rows * kernel.matmuls * wide
        return pl.CostEstimate(
            flops=2 * kernel.matmuls * scores * self.head_dim,
            transcendentals=scores,
            bytes_accessed=int(pairs * inner) + outer,
        )


def _dtype(inputs: Inputs) -> Any:
    """That of the matmuls: Mosaic has none for float16."""
    given = inputs.q.dtype
    return jnp.dtype(jnp.float32) if given == jnp.float16 else given


def _layouts(given: Given) -> Given:
    """The layout of each array of `given`, by name."""
    backward = given.d_out is not None
    segments = len(given.query_marks) > 1
    return Given(
        "query",
        "key",
        "key",
        ("reach", "query_segment") if segments else ("reach",),
        ("position", "key_segment") if segments else ("position",),
        table="words",
        d_out="query" if backward else None,
        lse="per_query" if backward else None,
        delta="per_query" if backward else None,
    )
