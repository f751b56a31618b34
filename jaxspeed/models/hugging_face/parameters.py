"""A decoder's parameters as records, and a decoder from its parameters."""

from typing import Any

import jax
from flax import nnx

from jaxspeed import spec
from jaxspeed.models.hugging_face.layout import LETTERS, Sizes
from jaxspeed.models.transformer import Decoder, DecoderConfig
from jaxspeed.parallel.zero import SCANNED


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """The module with shapes in place of arrays; nothing is allocated."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))


def parameters(config: DecoderConfig) -> Any:
    """The tree of `spec.Leaf`, nested like `nnx.to_pure_dict` of the parameters."""

    def dims(variable: Any) -> tuple[str, ...]:
        own = tuple(variable.get_metadata()["dims"])
        return (SCANNED,) * (len(variable.shape) - len(own)) + own

    state = nnx.state(abstract_decoder(config), nnx.Param)
    names = jax.tree.map(
        lambda variable: variable.replace(dims(variable)),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return spec.leaves(nnx.to_pure_dict(state), nnx.to_pure_dict(names))


def to_decoder(config: DecoderConfig, params: Any) -> Decoder:
    """The decoder that has these parameters, a tree as `parameters` describes it."""
    graph, state = nnx.split(abstract_decoder(config))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def letters(leaf: spec.Leaf) -> str:
    """The dims of one layer's parameter by letter, `DHK`."""
    return "".join(LETTERS[name] for name in leaf.dims if name and name != SCANNED)


def layer_numbers(leaf: spec.Leaf) -> list[int | None]:
    """The layers stacked in a parameter; one None for a parameter outside of them."""
    return list(range(leaf.shape[0])) if leaf.dims[:1] == (SCANNED,) else [None]


def stored_sizes(config: DecoderConfig) -> Sizes:
    """Lengths in the files, by letter: the vocabulary is not padded there."""
    return {
        "D": config.dim,
        "H": config.attention.heads,
        "G": config.attention.kv_heads,
        "K": config.attention.head_dim,
        "F": config.feed_forward.hidden_dim,
        "V": config.vocab_size,
        "P": config.position.max_length,
    }
