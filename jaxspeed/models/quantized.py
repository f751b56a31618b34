"""Decoders with quantized weights: the matrices of the layers in 4, 6 or 8 bits.

Quantization after training, of weights alone (Xia et al., 2024, FP6-LLM; Yao et al.,
2023, ZeroQuant-V2): each matrix is rounded to the nearest codes and multiplied without
being written out. Embeddings, norms, biases and, unless asked for, the head stay whole.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxspeed import spec
from jaxspeed.models.dims import is_variable
from jaxspeed.models.linear import is_quantized
from jaxspeed.models.parameters import parameters, with_params
from jaxspeed.models.transformer import Decoder, DecoderConfig
from jaxspeed.parallel import tensor
from kernels_pallas import quant_matmul as kernel
from kernels_pallas.quant_matmul import QuantizedTensor

SUMMED = {
    "layers/attention/query": 1,
    "layers/attention/key": 1,
    "layers/attention/value": 1,
    "layers/attention/out": 2,
    "layers/feed_forward/gate": 1,
    "layers/feed_forward/up": 1,
    "layers/feed_forward/down": 1,
}
"""Weights that are quantized, and how many of their dims a product sums over."""
HEAD = "head/projection"
KEY_VALUE = ("layers/attention/key", "layers/attention/value")
LANES = 128
"""A quantized weight is split in whole columns of this many."""


def quantize(
    model: Decoder,
    format: str,
    *,
    group: int | None = None,
    symmetric: bool = True,
    head: bool = False,
) -> Decoder:
    """The same decoder with quantized matmul weights.

    It generates (`js.serve.generate`) and is scored (`js.train.evaluate_model`) like
    any other, split over `tensor` too; it is not trained.

    Args:
        model: its parameters may be split over any mesh; it is not changed.
        format: one of `kernels_pallas.quant_matmul.FORMATS`, "fp6_e3m2" for instance.
        group: rows of a matrix that share a scale, 128 or a multiple of 256; None: all
            rows of a column do. The fp4 formats have their own.
        symmetric: False gives int8 and int4 a zero point.
        head: whether the projection to the vocabulary is quantized as well; a tied one
            is the embedding table and cannot be.

    Raises:
        ValueError: no such format or group, weights that are quantized already or not
            finite (named), or `head` where the head is tied.
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise ValueError("the model is quantized already; quantize the original")
    if head and model.config.tied:
        raise ValueError(
            "head=True, but the model's head is its embedding table; leave it False"
        )
    chosen = {**SUMMED, HEAD: 1} if head else SUMMED

    def convert(path: Any, weight: Array) -> Any:
        name = spec.path_name(path)
        if name not in chosen:
            return weight
        stack = weight.reshape(shape_as_matrices(name, weight.shape))
        try:
            return _quantize_stack(stack, format, group=group, symmetric=symmetric)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return with_params(model, jax.tree_util.tree_map_with_path(convert, params))


def shape_as_matrices(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[L, K, N] for the shape of a weight of the layers, [K, N] for the head's."""
    lead = 1 if name in SUMMED else 0
    count = lead + SUMMED.get(name, 1)
    return *shape[:lead], math.prod(shape[lead:count]), math.prod(shape[count:])


def _quantize_stack(weights: Array, format: str, **options: Any) -> QuantizedTensor:
    """One matrix after another, so that float32 copies are of one of them."""
    if weights.ndim == 2:
        return kernel.quantize(weights, format, **options)
    each = [kernel.quantize(matrix, format, **options) for matrix in weights]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)


def parameter_specs(
    config: DecoderConfig, params: nnx.State, sizes: Mapping[str, int]
) -> nnx.State:
    """Where tensor parallelism has each parameter, quantized or not.

    Args:
        config: of the decoder.
        params: `nnx.state` of it; arrays, shapes or tracers.
        sizes: of the mesh axes.

    Returns:
        `params` with a `PartitionSpec` in place of every array.

    Raises:
        ValueError: `tensor` divides no heads, hidden dim or vocabulary, or not their
            packed blocks; says which sizes would.
    """
    whole = spec.assign(tensor.rule(sizes), parameters(config))
    places = {
        spec.path_name(path): each
        for path, each in jax.tree_util.tree_leaves_with_path(whole)
    }

    def place(path: Any, variable: nnx.Variable) -> nnx.Variable:
        name, value = spec.path_name(path), variable.get_value()
        if not isinstance(value, QuantizedTensor):
            return variable.replace(places[name])
        return variable.replace(_quantized_specs(name, value, places[name], sizes))

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=is_variable)


def _quantized_specs(
    name: str, value: QuantizedTensor, whole: PartitionSpec, sizes: Mapping[str, int]
) -> QuantizedTensor:
    """The specs of a packed weight whose dims would be split as `whole`."""
    lead = len(value.lead)
    rows = spec.axes_of(whole, lead)
    columns = spec.axes_of(whole, lead + SUMMED.get(name, 1))
    # Few key and value heads may not fill whole blocks; every device then has all.
    if name in KEY_VALUE and value.shape[-1] % (LANES * sizes[tensor.AXIS]):
        columns = ()
    split = spec.from_axes([()] * lead + [rows, columns])
    try:
        return kernel.partition_specs(value, split, sizes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
