"""A decoder from its parameters, and the parameters of a decoder that is not there."""

import functools
from typing import Any

import jax
from flax import nnx

from jaxspeed.models.dims import leaves
from jaxspeed.models.transformer import Decoder, DecoderConfig


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """The module with shapes in place of arrays; nothing is allocated."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))


@functools.cache
def parameters(config: DecoderConfig) -> Any:
    """The tree of `spec.Leaf`, nested like `nnx.to_pure_dict` of the parameters."""
    return nnx.to_pure_dict(leaves(nnx.state(abstract_decoder(config), nnx.Param)))


def to_decoder(config: DecoderConfig, params: Any) -> Decoder:
    """The decoder that has these parameters, a tree as `parameters` describes it."""
    graph, state = nnx.split(abstract_decoder(config))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def with_params(model: Decoder, params: Any) -> Decoder:
    """`model` with other parameters, a tree like `nnx.to_pure_dict` of its own."""
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: leaf, state)  # `model` keeps its own
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
