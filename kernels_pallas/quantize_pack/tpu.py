"""Quantize-pack and unpack-reduce on TPU (Pallas Mosaic): one read and one write.

A grid step has a few blocks of 256 rows and up to 512 columns, and works through them
in parts of one block and 128 columns, which fit in registers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8

from kernels_pallas.arrays import vary_like
from kernels_pallas.quantize_pack.format import (
    BLOCK,
    Format,
    magnitude_bits,
    scales_of,
    unit_interval,
)
from kernels_pallas.quantize_pack.tpu_tiles import Tiles, struct

Ref = Any


def pack(
    kind: Format, group: int, x: Float[Array, "R N"], key: Array | None
) -> tuple[UInt8[Array, "B P S N"], Float[Array, "B G N"]]:
    """Codes of `x` in blocks of 256 rows, and a scale for every `group` of them."""
    if x.dtype == jnp.float16:  # Mosaic has no float16.
        x = x.astype(jnp.float32)
    rows, columns = x.shape
    tiles = Tiles(kind, group, rows, columns)
    seeds = None if key is None else vary_like(_seeds(key), x)
    run = pl.pallas_call(
        functools.partial(_pack_body, tiles),
        grid=tiles.grid,
        in_specs=[_seed_spec(seeds), tiles.matrix_spec()],
        out_specs=list(tiles.packed_specs()),
        out_shape=tiles.packed_structs(x),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
        ),
        cost_estimate=tiles.cost(parts=1, plain_bytes=x.dtype.itemsize),
        name=f"quantize_pack_{kind.name}",
    )
    packed, scales = run(seeds, x)
    return packed, scales


def reduce(
    kind: Format, packed: UInt8[Array, "n B P S N"], scales: Float[Array, "n B G N"]
) -> Float[Array, "R N"]:
    """The float32 sum over the leading dim of what was packed, all rows of blocks."""
    tiles, parts = _tiles_of(kind, packed, scales)
    run = pl.pallas_call(
        functools.partial(_reduce_body, tiles),
        grid=(*tiles.grid, parts),
        in_specs=list(tiles.packed_specs(parts=True)),
        out_specs=tiles.matrix_spec(),
        out_shape=struct((tiles.rows, tiles.columns), jnp.float32, packed),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=tiles.cost(parts=parts, plain_bytes=4),
        name=f"unpack_reduce_{kind.name}",
    )
    return run(packed, scales)


def reduce_and_pack(
    kinds: tuple[Format, Format],
    packed: UInt8[Array, "n B P S N"],
    scales: Float[Array, "n B G N"],
    key: Array | None,
) -> tuple[UInt8[Array, "B P S N"], Float[Array, "B G N"]]:
    """The sum, quantized again: it never leaves the chip in float32.

    Args:
        kinds: the format of the parts and that of the result.
        packed, scales: the parts.
        key: for stochastic rounding, or None.
    """
    tiles, parts = _tiles_of(kinds[0], packed, scales)
    result = dataclasses.replace(tiles, kind=kinds[1])
    seeds = None if key is None else vary_like(_seeds(key), packed)
    run = pl.pallas_call(
        functools.partial(_reduce_and_pack_body, tiles, result),
        grid=(*tiles.grid, parts),
        in_specs=[_seed_spec(seeds), *tiles.packed_specs(parts=True)],
        out_specs=list(result.packed_specs()),
        out_shape=result.packed_structs(packed),
        scratch_shapes=[pltpu.VMEM((tiles.step_rows, tiles.step_columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=tiles.cost(parts=parts, plain_bytes=1),
        name=f"unpack_reduce_{kinds[0].name}_pack_{kinds[1].name}",
    )
    packed, scales = run(seeds, packed, scales)
    return packed, scales


def _pack_body(
    tiles: Tiles, seeds: Ref | None, x: Ref, packed: Ref, scales: Ref
) -> None:
    _seed(seeds, _step())
    left = tiles.rows - pl.program_id(0) * tiles.step_rows

    def numbers(block: Any, part: slice) -> Array:
        found = x[pl.ds(block * BLOCK, BLOCK), part].astype(jnp.float32)
        if tiles.rows % BLOCK == 0:
            return found
        row = lax.broadcasted_iota(jnp.int32, found.shape, 0)
        return jnp.where(row < left - block * BLOCK, found, 0.0)

    _pack_blocks(tiles, seeds is not None, numbers, packed, scales)


def _pack_blocks(
    tiles: Tiles, stochastic: bool, numbers: Any, packed: Ref, scales: Ref
) -> None:
    """Packs `numbers(block, columns)`, float32, part by part."""
    kind = tiles.kind

    def pack_block(block: Any, _: None) -> None:
        for part in tiles.parts:
            found = numbers(block, part)
            grouped = found.reshape(BLOCK // tiles.group, tiles.group, -1)
            most = magnitude_bits(grouped).max(axis=1)
            scale, inverse = scales_of(
                lax.bitcast_convert_type(most, jnp.float32), kind.largest
            )
            scales[block, :, part] = scale
            scaled = (grouped * inverse[:, None]).reshape(found.shape)
            random = _uniform(found.shape) if stochastic else None
            carried = kind.carry(scaled, random)
            size = kind.slab_rows
            words = [
                pltpu.bitcast(carried[i * size : (i + 1) * size], jnp.uint32)
                for i in range(kind.slabs)
            ]
            for plane, joined in enumerate(kind.join(words)):
                packed[block, plane, :, part] = pltpu.bitcast(joined, jnp.uint8)

    lax.fori_loop(0, tiles.step_blocks, pack_block, None)


def _reduce_body(tiles: Tiles, packed: Ref, scales: Ref, total: Ref) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    _add_blocks(tiles, packed, scales, total)


def _reduce_and_pack_body(
    tiles: Tiles,
    result: Tiles,
    seeds: Ref | None,
    packed: Ref,
    scales: Ref,
    out_packed: Ref,
    out_scales: Ref,
    total: Ref,
) -> None:
    _reduce_body(tiles, packed, scales, total)
    step = _step()

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        _seed(seeds, step)

        def numbers(block: Any, part: slice) -> Array:
            return total[pl.ds(block * BLOCK, BLOCK), part]

        _pack_blocks(result, seeds is not None, numbers, out_packed, out_scales)


def _add_blocks(tiles: Tiles, packed: Ref, scales: Ref, total: Ref) -> None:
    kind = tiles.kind

    def add_block(block: Any, _: None) -> None:
        for part in tiles.parts:
            words = [
                pltpu.bitcast(packed[block, plane, :, part], jnp.uint32)
                for plane in range(kind.planes)
            ]
            slabs = [pltpu.bitcast(each, kind.carrier) for each in kind.split(words)]
            found = jnp.concatenate([each.astype(jnp.float32) for each in slabs], 0)
            grouped = found.reshape(BLOCK // tiles.group, tiles.group, -1)
            scale = scales[block, :, part] * kind.factor
            rows = pl.ds(block * BLOCK, BLOCK)
            total[rows, part] += (grouped * scale[:, None]).reshape(found.shape)

    lax.fori_loop(0, tiles.step_blocks, add_block, None)


def _tiles_of(kind: Format, packed: Array, scales: Array) -> tuple[Tiles, int]:
    parts, blocks, _, _, columns = packed.shape
    return Tiles(kind, BLOCK // scales.shape[2], blocks * BLOCK, columns), parts


def _seeds(key: Array) -> Int[Array, "2"]:
    bits = jax.random.bits(key, (2,), jnp.uint32)
    return lax.bitcast_convert_type(bits, jnp.int32)


def _seed_spec(seeds: Array | None) -> pl.BlockSpec | None:
    return None if seeds is None else pl.BlockSpec(memory_space=pltpu.SMEM)


def _step() -> Any:
    """The number of a step of rows and columns."""
    return pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)


def _seed(seeds: Ref | None, step: Any) -> None:
    """Another stream of random numbers for every step."""
    if seeds is not None:
        pltpu.prng_seed(seeds[0], seeds[1] + step)


def _uniform(shape: tuple[int, ...]) -> Array:
    bits = pltpu.prng_random_bits(shape)
    return unit_interval(lax.bitcast_convert_type(bits, jnp.uint32))
