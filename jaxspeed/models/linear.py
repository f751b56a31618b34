"""Products with weights that are arrays or quantized: a matmul goes by the leaf's type.

A quantized weight is one matrix [K, N], or a stack [L, K, N] over layers, of a weight
whose dims are more: those that are summed over are K, the others N. A scan over layers
leaves the stack where it is and walks over the number of the layer: a slice of it would
be copied before the kernel reads it.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.quant_matmul import QuantizedTensor, quant_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeight:
    """One matrix of a stack.

    Attributes:
        stack: [L, K, N].
        layer: which of them.
    """

    stack: QuantizedTensor
    layer: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Elsewhere:
    """Stands in a module for stack `number`, which is not sliced with the rest."""

    number: int = dataclasses.field(metadata=dict(static=True))


def is_quantized(weight: Any) -> bool:
    """Whether a weight, or a node of a tree of them, is quantized."""
    return isinstance(weight, (QuantizedTensor, LayerWeight))


def linear(x: Float[Array, "*B K"], weight: Any) -> Float[Array, "*B N"]:
    """`x @ weight`, for an array [K, N] or a quantized weight, in the dtype of `x`."""
    if isinstance(weight, LayerWeight):
        return quant_matmul(x, weight.stack, layer=weight.layer)
    if isinstance(weight, QuantizedTensor):
        return quant_matmul(x, weight)
    return x @ weight


def apart(layers: Any) -> tuple[Any, list[QuantizedTensor]]:
    """Stacked layers without their quantized weights, and those; for `together`."""
    leaves, structure = jax.tree.flatten(layers, is_leaf=is_quantized)
    stacks: list[QuantizedTensor] = []
    for position, leaf in enumerate(leaves):
        if is_quantized(leaf):
            leaves[position] = _Elsewhere(len(stacks))
            stacks.append(leaf)
    return jax.tree.unflatten(structure, leaves), stacks


def together(layer: Any, stacks: list[QuantizedTensor], index: Any) -> Any:
    """Layer number `index` again, from its other weights and all stacks."""

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, _Elsewhere):
            return leaf
        return LayerWeight(stacks[leaf.number], index)

    return jax.tree.map(put, layer, is_leaf=lambda leaf: isinstance(leaf, _Elsewhere))
