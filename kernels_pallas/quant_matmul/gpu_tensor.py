"""`GpuTensor`: a `QuantizedTensor` whose codes lie as a Hopper GPU takes them.

Files, shards and TPUs have one order of the codes; the tensor core of a GPU takes its
operands from registers, and each thread has to find its own side by side
(`gpu_words`). The order is changed once, when weights are loaded.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from kernels_pallas.quant_matmul import formats
from kernels_pallas.quant_matmul.format import Format
from kernels_pallas.quant_matmul.gpu_words import TILE, Codes
from kernels_pallas.quant_matmul.layouts import BLOCK
from kernels_pallas.quant_matmul.tensor import QuantizedTensor


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales", "zeros"],
    meta_fields=["format_name", "group", "padding", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class GpuTensor:
    """A weight [..., K, N] for `quant_matmul` and `w8a8_matmul` on Hopper GPUs.

    A pytree, as `QuantizedTensor` is, of the same size.

    Attributes:
        words: uint32 [..., N/64, K/256, R, 256], R = 2 * bits.
        scales: float32 [..., G, N].
        zeros: float32 [..., G, N] zero points, or None.
        format_name, group, padding, dtype: as in `QuantizedTensor`.
    """

    words: UInt32[Array, "*L T B R 256"]
    scales: Float[Array, "*L G N"]
    zeros: Float[Array, "*L G N"] | None
    format_name: str
    group: int | None
    padding: tuple[int, int]
    dtype: Any

    @property
    def format(self) -> Format:
        """What the codes mean."""
        return formats.get(self.format_name)

    @property
    def codes(self) -> Codes:
        """How they lie."""
        return Codes(self.format)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dims: a stack of matrices."""
        return self.words.shape[:-4]

    @property
    def padded(self) -> tuple[int, int]:
        """K and N as stored."""
        return self.words.shape[-3] * BLOCK, self.words.shape[-4] * TILE

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K, N] without padding."""
        rows, columns = self.padded
        return *self.lead, rows - self.padding[0], columns - self.padding[1]

    @property
    def ndim(self) -> int:
        """Dims of the logical array."""
        return len(self.lead) + 2

    @property
    def nbytes(self) -> int:
        """Bytes of all the arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def take(self, layer: Int[Array, ""] | None) -> "GpuTensor":
        """Matrix `layer` of a stack; None: the only one."""
        if layer is None:
            return self
        take = functools.partial(
            lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False
        )
        return jax.tree.map(take, self)


def arrange_for_gpu(w: QuantizedTensor) -> GpuTensor:
    """The same weight in the order of a Hopper GPU; nothing is rounded.

    Works under `jit`, and inside of `shard_map` on shards.

    Raises:
        ValueError: a format whose scales are of less than 128 rows.
    """
    if w.format.group is not None:
        raise ValueError(
            f"{w.format_name} has scales of {w.format.group} rows, too few for the GPU "
            "kernel; use int8, int4, an fp6 or an fp8 format"
        )
    words = Codes(w.format).pack(w.data)
    return GpuTensor(
        words, w.scales, w.zeros, w.format_name, w.group, w.padding, w.dtype
    )


def arrange_from_gpu(w: GpuTensor) -> QuantizedTensor:
    """The inverse of `arrange_for_gpu`."""
    data = w.codes.unpack(w.words)
    return QuantizedTensor(
        data, w.scales, w.zeros, None, w.format_name, w.group, w.padding, w.dtype
    )


def as_quantized(w: QuantizedTensor | GpuTensor) -> QuantizedTensor:
    """The weight in the order of everything but a GPU."""
    return arrange_from_gpu(w) if isinstance(w, GpuTensor) else w
