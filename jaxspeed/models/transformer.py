"""One decoder, many families: Llama, Mistral, Qwen, GPT-2 and BLOOM by configuration.

Layers are stacked on a leading dim and run as one scan, so the program's size does not
grow with depth and ZeRO-3 holds one layer whole at a time: each part gathers its own
weights where it uses them and keeps none for the backward pass.

The same object trains, scores and generates. Inside `shard_map` it works on shards;
called as `model(tokens)` outside, on whole arrays or arrays that jit partitions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxspeed import comm
from jaxspeed.mesh import AXES
from jaxspeed.models import layers as L
from jaxspeed.models.attention import FULL_WINDOW, Places, attention
from jaxspeed.models.linear import apart, linear, together
from jaxspeed.models.next_token import next_token_losses
from jaxspeed.models.remat import policy_named
from jaxspeed.models.sparse_attention import SparseAttention, SparseConfig, windows
from jaxspeed.parallel import tensor
from jaxspeed.parallel.data import Loss
from jaxspeed.parallel.prefetch import scan_layers
from jaxspeed.parallel.zero import gather


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that sets one decoder apart from another.

    Attributes:
        vocab_size: number of token ids.
        dim: width D of the residual stream.
        num_layers: depth L.
        tied: the output projection is the embedding table.
        embedding_norm: a norm right after the embedding (BLOOM).
        vocab_multiple: the table is padded to a multiple of this, so that `tensor` can
            split it; padded entries are never predicted.
    """

    vocab_size: int = 257
    dim: int = 256
    num_layers: int = 6
    attention: L.AttentionConfig = L.AttentionConfig()
    feed_forward: L.FeedForwardConfig = L.FeedForwardConfig()
    norm: L.NormConfig = L.NormConfig()
    position: L.PositionConfig = L.PositionConfig()
    tied: bool = False
    embedding_norm: bool = False
    vocab_multiple: int = 128

    def __post_init__(self) -> None:
        for field in ("vocab_size", "dim", "num_layers", "vocab_multiple"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} is {getattr(self, field)}; at least 1")
        self._check_sparse(self.attention.sparse)

    def _check_sparse(self, sparse: SparseConfig) -> None:
        if sparse.mode != "dense" and self.position.kind == "alibi":
            raise ValueError(
                f"attention.sparse.mode={sparse.mode!r} does not go with "
                "position.kind='alibi'; choose mode 'dense', or 'rope' or 'learned' "
                "positions"
            )
        layers = sparse.layers or ()
        if any(not 0 <= layer < self.num_layers for layer in layers):
            raise ValueError(
                f"attention.sparse.layers is {layers}; the model has layers 0 to "
                f"{self.num_layers - 1}"
            )

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
        keys, values: [L, B, T, G@tensor, K].
        places: positions and segments of the T slots; segment -1 marks an empty one.
        length: int32 scalar, slots in use.
    """

    keys: Array
    values: Array
    places: Places
    length: Int[Array, ""]


class Embedding(nnx.Module):
    """Token table, with learned positions or a norm where the family has them."""

    def __init__(self, config: DecoderConfig, *, rngs: Any) -> None:
        self.tokens = L.weight(
            rngs.params(),
            (config.padded_vocab, config.dim),
            ("vocabulary", "model"),
            L.INIT_SCALE,
        )
        shape, dims = (config.position.max_length, config.dim), ("positions", "model")
        self.positions = (
            L.weight(rngs.params(), shape, dims, L.INIT_SCALE)
            if config.position.kind == "learned"
            else None
        )
        self.norm = L.Norm(config.dim, config.norm) if config.embedding_norm else None

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        region: tensor.Region,
    ) -> Float[Array, "B s D"]:
        x = tensor.embed(self.tokens[...], tokens, region)
        if self.positions is not None:
            x = x + self.positions[...][region.scatter(positions)]
        return x if self.norm is None else self.norm(x)


class Block(nnx.Module):
    """Attention and feed-forward, each with its norm before and a residual around."""

    def __init__(self, config: DecoderConfig, *, rngs: Any) -> None:
        self.attention_norm = L.Norm(config.dim, config.norm)
        self.attention = L.Attention(
            config.dim, config.attention, config.position, config.norm, rngs=rngs
        )
        self.feed_forward_norm = L.Norm(config.dim, config.norm)
        self.feed_forward = L.FeedForward(config.dim, config.feed_forward, rngs=rngs)

    def project(self, x: Array, places: Places, region: tensor.Region):
        """Queries, keys and values of this layer for the whole sequence."""
        with jax.named_scope("attention"):
            x = region.enter(self.attention_norm(x))
            return self.attention.project(x, places.positions)

    def finish(self, x: Array, attended: Array, region: tensor.Region) -> Array:
        """The rest of the layer after attention."""
        with jax.named_scope("attention"):
            x = x + self.attention.output(attended, region)
        with jax.named_scope("feed_forward"):
            y = region.enter(self.feed_forward_norm(x))
            return x + self.feed_forward(y, region)


class Head(nnx.Module):
    """The last norm and the projection to the vocabulary (the table where tied)."""

    def __init__(self, config: DecoderConfig, *, rngs: Any) -> None:
        self.vocab_size = config.vocab_size
        self.norm = L.Norm(config.dim, config.norm)
        shape, dims = (config.dim, config.padded_vocab), ("model", "vocabulary")
        key = rngs.params()
        self.projection = (
            None if config.tied else L.weight(key, shape, dims, L.INIT_SCALE)
        )

    def __call__(
        self, x: Float[Array, "B S D"], table: Float[Array, "v D"] | None
    ) -> Float[Array, "B S v"]:
        """Logits split by vocabulary, from normed `x`; `table` is the embedding's."""
        if self.projection is None:
            logits = jnp.einsum("bsd,vd->bsv", x, table)
        else:
            logits = linear(x, self.projection.get_value())
        columns = tensor.vocabulary_columns(logits.shape[-1])[None, None]
        lowest = jnp.finfo(logits.dtype).min
        return jnp.where(columns < self.vocab_size, logits, lowest)


def attention_of(config: L.AttentionConfig) -> Callable[..., Array]:
    """The attention function of a configuration."""
    if config.sparse.mode == "dense":
        return attention
    return SparseAttention(config.sparse, config.heads)


class Decoder(nnx.Module):
    """A causal decoder.

    Args:
        config: the architecture.
        rngs: flax random streams; "params" is used.
        attention: an attention function as in `models.attention`; by default the one
            that the configuration asks for.
        remat_policy: which activations layers keep, a name in `models.remat`.
    """

    gathers = True
    """Tells the engine that this model gathers its own ZeRO shards."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: Any,
        attention: Callable[..., Array] | None = None,
        remat_policy: str = "full",
    ) -> None:
        self.config = config
        self.attend = attention_of(config.attention) if attention is None else attention
        self.remat_policy = remat_policy
        self.embedding = Embedding(config, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(
            keys
        )
        self.head = Head(config, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segments: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits of the next token, for every token.

        Args:
            tokens: ids in [0, vocab_size).
            positions: position of each token in its document; 0, 1, ... by default.
            segments: document number of each token. By default a position that does
                not grow starts a new document.

        Raises:
            ValueError: a sequence longer than the learned positions.
        """
        places = self._places(tokens, positions, segments)
        region = tensor.Region.of(tokens.shape[1])
        x = self._layers(self._embed(tokens, places, region), places, region)
        logits = tensor.whole_logits(self._logits(x, region))
        return logits[..., : self.config.vocab_size]

    def loss(self, batch: dict[str, Array], key: Array | None = None) -> Loss:
        """Next-token cross-entropy in nats, weighted by `batch["weights"]`.

        Args:
            batch: `tokens` and `targets` int [B, S]; optionally `weights` float,
                `segments` and `positions` int, all [B, S]. A negative target does not
                count; one beyond the vocabulary makes the loss NaN.
            key: unused; the decoder has no randomness.
        """
        del key
        tokens, targets = batch["tokens"], batch["targets"]
        places = self._places(tokens, batch.get("positions"), batch.get("segments"))
        region = tensor.Region.of(tokens.shape[1])
        x = self._layers(self._embed(tokens, places, region), places, region)

        # The head is gathered once: its backward pass follows at once. So is the
        # embedding: its backward pass reads no weight.
        with jax.named_scope("head"):
            x, logits_of = self._head(x, region)
            vocabulary = self.config.padded_vocab // comm.axis_size(tensor.AXIS)
            losses = next_token_losses(logits_of, x, targets, vocabulary=vocabulary)
        weights = batch.get("weights")
        if weights is None:
            weights = jnp.ones_like(losses)
        weights = jnp.where(targets >= 0, weights, 0.0)
        losses = jnp.where(targets < self.config.vocab_size, losses, jnp.nan)
        return Loss(jnp.sum(losses * weights), jnp.sum(weights))

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens in each of `batch` sequences."""
        attention = self.config.attention
        heads = tensor.num_local_kv_heads(attention.kv_heads, attention.heads)
        shape = (self.config.num_layers, batch, length, heads, attention.head_dim)
        slots = jnp.zeros((batch, length), jnp.int32)
        dtype = self.embedding.tokens.dtype
        return Cache(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            Places(slots, slots - 1),
            jnp.zeros((), jnp.int32),
        )

    def decode(
        self, tokens: Int[Array, "B S"], places: Places, cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Appends S tokens to the cache; logits after the last of them.

        The caller keeps `cache.length + S` within the cache.
        """
        region = tensor.Region.of(tokens.shape[1])

        def put(slots: Array, new: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(slots, new, cache.length, axis=1)

        seen = jax.tree.map(put, cache.places, places)

        layers, stacks = apart(self.layers)

        def block(carry: Any, xs: Any):
            x, keys, values = carry
            index, layer, window = xs
            layer = together(gather(layer), stacks, index)
            q, k, v = layer.project(x, places, region)
            start = (index, 0, cache.length, 0, 0)
            keys = lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), start)
            values = lax.dynamic_update_slice(
                values, v[None].astype(values.dtype), start
            )
            attended = self.attend(
                q,
                lax.dynamic_index_in_dim(keys, index, keepdims=False),
                lax.dynamic_index_in_dim(values, index, keepdims=False),
                places,
                seen,
                window,
                layer.attention.slopes(),
            )
            return (layer.finish(x, attended, region), keys, values), None

        x = comm.vary(self._embed(tokens, places, region), AXES)
        keys, values = comm.vary(cache.keys, AXES), comm.vary(cache.values, AXES)
        index = jnp.arange(self.config.num_layers)
        (x, keys, values), _ = lax.scan(
            block, (x, keys, values), (index, layers, self.windows())
        )
        # Logits of the last token only: those of a long prompt would fill the memory.
        last = region.enter(x)[:, -1:]
        logits = tensor.whole_logits(self._logits(last, tensor.Region(split=False)))
        cache = Cache(keys, values, seen, cache.length + tokens.shape[1])
        return logits[:, 0, : self.config.vocab_size], cache

    def _places(self, tokens: Array, positions: Any, segments: Any) -> Places:
        length, position = tokens.shape[1], self.config.position
        if positions is None:
            if position.kind == "learned" and length > position.max_length:
                raise ValueError(
                    f"sequences of {length} tokens, but the model has learned only "
                    f"{position.max_length} positions (position.max_length)"
                )
            row = jnp.arange(length, dtype=jnp.int32)
            positions = jnp.broadcast_to(row, tokens.shape)
        if segments is None:
            starts = positions[:, 1:] <= positions[:, :-1]
            first = jnp.ones((tokens.shape[0], 1), jnp.int32)
            rest = 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
            segments = jnp.concatenate([first, rest], axis=1)
        return Places(positions, segments)

    def windows(self) -> Int[Array, " L"] | None:
        """What the attention function is given as the window of each layer."""
        attention = self.config.attention
        if attention.window is None:
            listed = windows(attention.sparse, self.config.num_layers)
            return None if listed is None else jnp.asarray(listed)
        windowed = attention.window_layers
        return jnp.asarray(
            [
                attention.window if windowed is None or i in windowed else FULL_WINDOW
                for i in range(self.config.num_layers)
            ]
        )

    @jax.named_scope("embedding")
    def _embed(self, tokens: Array, places: Places, region: tensor.Region) -> Array:
        return gather(self.embedding)(tokens, places.positions, region)

    @jax.named_scope("layers")
    def _layers(self, x: Array, places: Places, region: tensor.Region) -> Array:
        layers, stacks = apart(self.layers)
        index = jnp.arange(self.config.num_layers) if stacks else None

        def block(layer: Block, x: Array, shared: Any, own: Any) -> Array:
            (places, stacks), (window, index) = shared, own
            layer = together(layer, stacks, index)
            q, k, v = layer.project(x, places, region)
            slopes = layer.attention.slopes()
            with jax.named_scope("attention"):
                attended = self.attend(q, k, v, places, places, window, slopes)
            return layer.finish(x, attended, region)

        return scan_layers(
            block,
            comm.vary(x, AXES),
            layers,
            shared=(places, stacks),
            per_layer=(self.windows(), index),
            policy=policy_named(self.remat_policy),
        )

    @jax.named_scope("head")
    def _logits(self, x: Array, region: tensor.Region) -> Float[Array, "B S v"]:
        x, logits_of = self._head(x, region)
        return logits_of(x)

    def _head(self, x: Array, region: tensor.Region):
        """The whole sequence after the last norm, and what makes logits of it."""
        head = gather(self.head)
        table = gather(self.embedding.tokens)[...] if self.config.tied else None
        return region.enter(head.norm(x)), lambda x: head(x, table)
