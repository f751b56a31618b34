"""Words of 32 bits as operands of a Hopper GPU's tensor core, without moving a bit.

wgmma takes its left operand [64, K] from registers. Which element is in which register
of which thread is fixed (PTX ISA, "Register fragments for wgmma"): a register holds
neighbours along K, and a thread's registers follow each other along K first by the two
halves of 16 rows. Words that are stored in this order are the operand.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxtyping import Array, UInt32

ROWS = 64
THREADS = 128
VECTOR = 4
"""Words that a thread reads at once."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """What becomes an operand [64, K] of wgmma.

    Attributes:
        words: arrays of the same shape, in `words_layout`.
        order: int [arrays, words of a thread]; `order[a, v]` is the place of word v of
            a thread, of array a, among the thread's registers of the operand.
        scales: the numbers of array a are multiplied by `scales[a]`; None: by nothing.
        offset: that is then added to them.
    """

    words: Sequence[UInt32[Array, "R W"]]
    order: np.ndarray
    scales: Sequence[float] | None = None
    offset: float = 0.0


def words_layout(shape: tuple[int, ...]) -> Any:
    """Four words for each of 128 threads in turn."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=VECTOR)


def fragments(operand: Operand, dtype: Any) -> Array:
    """An operand [64, K] in registers, made of words in registers.

    Args:
        operand: the words.
        dtype: float16, or one of 8 bits.
    """
    words, order, per_word = operand.words, operand.order, _per_word(dtype)
    shape = (ROWS, sum(each.size for each in words) * per_word // ROWS)
    layout = plgpu.Layout.WGMMA if per_word == 2 else plgpu.Layout.WGMMA_8BIT

    @plgpu.inline_mgpu(
        arg_types=tuple(words_layout(each.shape) for each in words),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
    )
    def rename(_: Any, *arrays: Any) -> Any:
        target = layout.to_mgpu()
        element = mgpu_utils.dtype_to_ir_type(jnp.dtype(dtype))
        register = ir.VectorType.get((per_word,), element)
        named = np.empty(order.size, dtype=object)
        for i, (array, places) in enumerate(zip(arrays, order, strict=True)):
            for place, word in zip(places, _split(array), strict=True):
                numbers = mgpu_utils.bitcast(word, register)
                named[place] = _finish(numbers, operand, i)
        return mgpu.FragmentedArray(
            _registers=named.reshape(target.registers_shape(shape)),
            _layout=target,
            _is_signed=mgpu_utils.is_signed(jnp.dtype(dtype)),
        )

    return rename(*words)


def _split(array: Any) -> list[Any]:
    """A thread's words, one by one."""
    return [
        mgpu_utils.vector_slice(vector, slice(i, i + 1))
        for vector in array.registers.flat
        for i in range(VECTOR)
    ]


def _finish(numbers: Any, operand: Operand, array: int) -> Any:
    """Scaled and moved, in one operation."""
    if operand.scales is None:
        return numbers
    element = ir.VectorType(numbers.type).element_type

    def splat(value: float) -> Any:
        attribute = ir.FloatAttr.get(element, value)
        constant = ir.DenseElementsAttr.get_splat(numbers.type, attribute)
        return arith.constant(numbers.type, constant)

    # The compiler may make one operation of the two, and does.
    fuses = ir.Attribute.parse("#arith.fastmath<contract>")
    scaled = arith.mulf(numbers, splat(operand.scales[array]), fastmath=fuses)
    return arith.addf(scaled, splat(operand.offset), fastmath=fuses)


def _per_word(dtype: Any) -> int:
    return 4 // jnp.dtype(dtype).itemsize


def emulated(operand: Operand, dtype: Any) -> Array:
    """`fragments` in plain JAX: element by element what the hardware holds."""
    words, order = operand.words, operand.order
    stacked = jnp.stack(words).reshape(len(words), -1, THREADS, VECTOR)
    by_thread = stacked.swapaxes(2, 3).reshape(order.size, THREADS)
    places = [int(place) for place in np.argsort(order.ravel())]
    registers = []
    for place in places:
        register = lax.index_in_dim(by_thread, place, 0)
        numbers = lax.bitcast_convert_type(register, dtype)
        if operand.scales is not None:
            # In float32, where no backend flushes small numbers of float16 to zero.
            scale = operand.scales[place // order.shape[1]]
            wide = numbers.astype(jnp.float32) * scale + operand.offset
            numbers = wide.astype(dtype)
        registers.append(numbers)
    # Registers are (along K, which half of 16 rows); threads (warp, row, along K).
    split = jnp.concatenate(registers).reshape(-1, 2, 4, 8, 4, _per_word(dtype))
    return split.transpose(2, 1, 3, 0, 4, 5).reshape(ROWS, -1)
