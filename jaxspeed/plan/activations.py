"""Bytes of activations on one device, in closed form, for the decoder.

Korthikanti et al., 2022, section 4, count what a layer keeps for its backward pass;
here it is counted for this decoder: flash attention keeps no scores, and the policies
of `models.remat` keep what they say. The sequence between the blocks is split over
`tensor`, within a block its heads or its hidden dim are.

Legend: B sequences of a micro-batch on this device, S tokens in each, D model dim,
H heads, G key and value heads, K head dim, F feed-forward, V vocabulary; a small letter
is the part of that dim on one device.
"""

import dataclasses

import jax.numpy as jnp

from jaxspeed.models.attention import BLOCKWISE_FROM
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.parallel import tensor
from jaxspeed.spec import Sizes

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Activations:
    """The activations of one micro-batch on one device.

    Attributes:
        model: the decoder.
        shards: size of mesh axis `tensor`.
        sequences: B.
        length: S.
        width: bytes of an element in the compute dtype.
    """

    model: DecoderConfig
    shards: int
    sequences: int
    length: int
    width: int

    @classmethod
    def of(
        cls,
        model: DecoderConfig,
        sizes: Sizes,
        *,
        sequences: int,
        length: int,
        compute: str,
    ) -> "Activations":
        """For a mesh of these sizes and a compute dtype."""
        width = jnp.dtype(compute).itemsize
        return cls(model, sizes[tensor.AXIS], sequences, length, width)

    @property
    def tokens(self) -> int:
        """B S: tokens within a block."""
        return self.sequences * self.length

    @property
    def split_tokens(self) -> int:
        """B s: tokens between blocks; a length that `tensor` divides is split."""
        split = self.length % self.shards == 0
        return self.tokens // self.shards if split else self.tokens

    @property
    def heads(self) -> int:
        """Query heads here."""
        return self.model.attention.heads // self.shards

    @property
    def kv_heads(self) -> int:
        """Key and value heads here; shared ones exist more than once."""
        attention = self.model.attention
        if attention.kv_heads % self.shards == 0:
            return attention.kv_heads // self.shards
        shared = self.shards % attention.kv_heads == 0
        return 1 if shared else self.heads

    @property
    def blockwise(self) -> bool:
        """Attention never has whole scores."""
        sparse = self.model.attention.sparse.mode != "dense"
        return sparse or self.length >= BLOCKWISE_FROM

    def stream(self) -> int:
        """The residual stream: [B, s, D]."""
        return self.split_tokens * self.model.dim * self.width

    def whole_stream(self) -> int:
        """The input or output of a block: [B, S, D]."""
        return self.tokens * self.model.dim * self.width

    def hidden(self) -> int:
        """The hidden layer of the feed-forward: [B, S, f]."""
        hidden = self.model.feed_forward.hidden_dim // self.shards
        return self.tokens * hidden * self.width

    def projections(self) -> int:
        """Queries, keys and values: [B, S, h + 2g, K]."""
        heads = self.heads + 2 * self.kv_heads
        return self.tokens * heads * self.model.attention.head_dim * self.width

    def attended(self) -> int:
        """What attention returns: [B, S, h, K]."""
        return self.tokens * self.heads * self.model.attention.head_dim * self.width

    def scores(self) -> int:
        """Whole scores of attention, float32: [B, h, S, S]."""
        return self.tokens * self.heads * self.length * FLOAT32

    def saved(self, remat: str) -> int:
        """What one layer keeps for its backward pass under a policy."""
        if remat == "full":
            return self.stream()
        if remat == "none":
            return self.everything()
        matrices = 2 if self.model.feed_forward.gated else 1
        kept = self.stream() + self.projections() + self.whole_stream()
        kept += matrices * self.hidden()
        if remat == "dots" and not self.blockwise:
            kept += self.scores() + self.attended()
        return kept

    def everything(self) -> int:
        """What one layer keeps without recomputation.

        A norm keeps its input and its result in float32, before and after the scale in
        the compute dtype; the feed-forward its matmuls' results, and the parts of the
        activation function and of the product.
        """
        attention, norm = self.model.attention, 2 * (FLOAT32 + self.width)
        norms = 2 * self.split_tokens * self.model.dim * norm
        if attention.qk_norm:
            heads = self.heads + self.kv_heads
            per_head = norm - self.width
            norms += self.tokens * heads * attention.head_dim * per_head
        kept = norms + self.projections() + self.attended() + 6 * self.hidden()
        if self.model.position.kind == "rope":
            # Cosines and sines, of queries and of keys.
            kept += 4 * self.tokens * attention.head_dim // 2 * FLOAT32
        if self.blockwise:
            return kept + self.tokens * self.heads * FLOAT32  # log of the sums
        # Scores before and after the softmax, and in the compute dtype; the mask.
        return kept + self.scores() * (2 * FLOAT32 + self.width + 1) // FLOAT32
