"""How a `QuantizedTensor` or a `GpuTensor` is split over devices."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from jax.sharding import PartitionSpec

from kernels_pallas.quant_matmul.gpu_tensor import GpuTensor
from kernels_pallas.quant_matmul.layouts import BLOCK, LANES
from kernels_pallas.quant_matmul.tensor import QuantizedTensor

Weight = TypeVar("Weight", QuantizedTensor, GpuTensor)


def partition_specs(
    w: Weight, spec: PartitionSpec, axis_sizes: Mapping[str, int]
) -> Weight:
    """The specs of the arrays of `w` if the weight is split as `spec` says.

    A shard is a whole number of packed blocks, and so a weight itself: these are the
    `in_specs` of a `shard_map` that multiplies with it. Scales of whole columns are
    repeated where K is split.

    Args:
        w: arrays, or `jax.ShapeDtypeStruct`s, not split yet.
        spec: of the logical [..., K, N].
        axis_sizes: of the mesh, `mesh.shape`.

    Returns:
        a pytree like `w` with a `PartitionSpec` for every array.

    Raises:
        ValueError: a dim cannot be split so: the message names the dim, its block and
            the numbers of devices that can share it.
    """
    if len(spec) > w.ndim:
        raise ValueError(f"{spec} has {len(spec)} dims, the weight {w.shape} {w.ndim}")
    names = (*spec, *[None] * (w.ndim - len(spec)))
    counts = [_devices(name, axis_sizes) for name in names]
    for dim, (size, count) in enumerate(zip(w.lead, counts[:-2], strict=True)):
        if size % count:
            raise ValueError(
                f"dim {dim} of the weight {w.shape} is {size}; {names[dim]} has "
                f"{count} devices, give one of {_divisors(size)}"
            )
    rows = math.lcm(BLOCK, w.group or 1)
    _check_split(w, "K", 0, rows, counts[-2])
    _check_split(w, "N", 1, LANES, counts[-1])
    *lead, k, n = names
    scale_rows = None if w.group is None else k
    scales = PartitionSpec(*lead, scale_rows, n)
    zeros = None if w.zeros is None else scales
    if isinstance(w, GpuTensor):
        words = PartitionSpec(*lead, n, k, None, None)
        return dataclasses.replace(w, words=words, scales=scales, zeros=zeros)
    inner = [None] * (w.format.layout.rank - 2)
    of_tensor = PartitionSpec(*lead, None, None)
    return dataclasses.replace(
        w,
        data=PartitionSpec(*lead, k, *inner, n),
        scales=scales,
        zeros=zeros,
        tensor_scale=None if w.tensor_scale is None else of_tensor,
    )


def _check_split(
    w: QuantizedTensor | GpuTensor, name: str, dim: int, block: int, devices: int
) -> None:
    if devices == 1:
        return
    size, padding = w.shape[w.ndim - 2 + dim], w.padding[dim]
    if padding:
        raise ValueError(
            f"{name}={size} of {w.format_name} is padded to {size + padding}, whole "
            f"blocks of {block}, and cannot be split over {devices} devices; pad the "
            f"weight to {name}={-(-size // (block * devices)) * block * devices} "
            "before it is quantized, or leave the dim whole"
        )
    if size % (block * devices):
        raise ValueError(
            f"{name}={size} of {w.format_name} is packed in blocks of {block} and "
            f"cannot be split over {devices} devices; these numbers of devices can "
            f"share it: {_divisors(size // block)}"
        )


def _devices(name: Any, axis_sizes: Mapping[str, int]) -> int:
    """Over how many devices a dim is split."""
    if name is None:
        return 1
    names = name if isinstance(name, tuple) else (name,)
    for each in names:
        if each not in axis_sizes:
            raise ValueError(f"no mesh axis {each!r}; there are {list(axis_sizes)}")
    return math.prod(axis_sizes[each] for each in names)


def _divisors(n: int) -> list[int]:
    return [each for each in range(1, min(n, 1024) + 1) if n % each == 0]
