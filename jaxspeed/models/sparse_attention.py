"""Block-sparse attention of the decoder, by the layouts of DeepSpeed.

`SparseConfig` names a layout (Child et al., 2019; Zaheer et al., 2020; Beltagy et al.,
2020) and `SparseAttention` is the attention function that computes its blocks and no
others. The decoder is causal to the token whatever a layout lists.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.models.attention import (
    FULL_WINDOW,
    Places,
    attention,
    masked_attention,
    visible,
)
from jaxspeed.parallel import tensor
from kernels_pallas.block_sparse_attention import (
    LAYOUTS,
    Layout,
    block_sparse_attention,
)

LISTED = 0
"""The window of a layer that sees what the layout lists; others have FULL_WINDOW."""


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """Which blocks of keys the queries of a block see. None: the default of the mode.

    Attributes:
        mode: "dense" (all, by the ordinary attention), "fixed", "variable", "bigbird",
            "bslongformer" or "local"; `kernels_pallas.block_sparse_attention` says what
            each lists, and the fields from `attention` on are those of its layouts.
        block: tokens in a block. TPUs do best with 128 or more.
        layers: the layers that have the layout, the others see everything; None means
            all of them have it.
        different_layout_per_head: whether heads have layouts of their own.
        attention: "unidirectional" or "bidirectional", which matters to what else can
            be asked for: the decoder is causal in either case.
    """

    mode: str = "dense"
    block: int = 16
    layers: tuple[int, ...] | None = None
    different_layout_per_head: bool = False
    attention: str | None = None
    num_local_blocks: int | None = None
    num_global_blocks: int | None = None
    horizontal_global_attention: bool | None = None
    num_different_global_patterns: int | None = None
    num_random_blocks: int | None = None
    local_window_blocks: tuple[int, ...] | None = None
    global_block_indices: tuple[int, ...] | None = None
    global_block_end_indices: tuple[int, ...] | None = None
    num_sliding_window_blocks: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in LAYOUTS:
            raise ValueError(
                f"sparse.mode is {self.mode!r}; choose one of {list(LAYOUTS)}"
            )
        if self.mode == "dense":
            self._check_dense()
            return
        allowed = fields_of(self.mode)
        other = [name for name in self._options() if name not in allowed]
        if other:
            raise ValueError(
                f"sparse.{other[0]} is given, but mode {self.mode!r} has only the "
                f"fields {', '.join(allowed)}"
            )
        self._layout(1)

    def _check_dense(self) -> None:
        given = [
            field.name
            for field in dataclasses.fields(self)
            if field.name != "mode" and getattr(self, field.name) != field.default
        ]
        if given:
            raise ValueError(
                f"sparse.{given[0]} is given, but mode 'dense' has no layout and no "
                f"fields; choose a mode of {list(LAYOUTS)[1:]}, or leave "
                f"{', '.join(given)} out"
            )

    def _options(self) -> dict[str, Any]:
        """The fields that are not left to the mode."""
        given = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in given.items() if value is not None}

    def _layout(self, heads: int) -> Layout:
        """Raises ValueError for values that contradict each other."""
        return LAYOUTS[self.mode](
            num_heads=heads,
            block=self.block,
            different_layout_per_head=self.different_layout_per_head,
            **self._options(),
        )

    def layout(self, heads: int, length: int) -> Bool[np.ndarray, "H N N"]:
        """The blocks that those of `length` tokens list, none after their own.

        A shorter sequence has the beginning of it, so that a cache, which is longer
        than what it holds, is read as training read.
        """
        return self._layout(heads)(length, causal=True)

    def visible_keys(self, heads: int, length: int) -> float:
        """Keys that a token sees on average, over a sequence of `length` and heads.

        A block on the diagonal counts half, as all of causal attention does.
        """
        return _visible_keys(self, heads, length)


@functools.cache
def _visible_keys(config: SparseConfig, heads: int, length: int) -> float:
    layout = config.layout(heads if config.different_layout_per_head else 1, length)
    tokens = np.full(layout.shape[1], config.block)
    tokens[-1] -= tokens.sum() - length
    seen = layout.mean(axis=0)
    pairs = tokens @ seen @ tokens - (seen.diagonal() * tokens**2).sum() / 2
    return float(pairs / length)


OPTIONS = tuple(
    field.name
    for field in dataclasses.fields(SparseConfig)
    if field.name not in ("mode", "block", "layers", "different_layout_per_head")
)
"""Fields of `SparseConfig` that not every mode has."""


def fields_of(mode: str) -> list[str]:
    """The fields of `SparseConfig`, beside `mode` and `layers`, that a mode reads."""
    own = {field.name for field in dataclasses.fields(LAYOUTS[mode])} - {"num_heads"}
    return [each.name for each in dataclasses.fields(SparseConfig) if each.name in own]


@dataclasses.dataclass(frozen=True)
class SparseAttention:
    """The attention function of a layout, as in `models.attention`.

    Blocks are counted from the start of the row in self-attention, packed documents or
    not, and from the start of the document where keys come from a cache.

    Attributes:
        config: the layout.
        heads: H of all devices together.
    """

    config: SparseConfig
    heads: int

    def __call__(
        self,
        q: Float[Array, "B S h K"],
        k: Float[Array, "B T g K"],
        v: Float[Array, "B T g K"],
        queries: Places,
        keys: Places,
        window: Int[Array, ""] | int | None,
        slopes: None,
    ) -> Float[Array, "B S h K"]:
        """Softmax attention over the listed blocks; h heads of H are on this device.

        Args:
            q, k, v, queries, keys: as for `dense_attention`.
            window: None or `LISTED`: the layout; else all is seen.
            slopes: none; layouts have no penalty by distance.
        """
        sparse = self._within_row if queries is keys else self._with_cache
        if window is None:
            return sparse(q, k, v, queries, keys)
        whole = functools.partial(attention, window=None, slopes=slopes)
        # The branches close over the places: as operands they would be copies, and
        # `queries is keys` tells self-attention.
        return lax.cond(
            window == LISTED,
            lambda: sparse(q, k, v, queries, keys),
            lambda: whole(q, k, v, queries, keys),
        )

    def _within_row(
        self, q: Array, k: Array, v: Array, queries: Places, keys: Places
    ) -> Array:
        return block_sparse_attention(
            q,
            k,
            v,
            self.config.layout(self.heads, q.shape[1]),
            block=self.config.block,
            segments=queries.segments,
            first_head=tensor.first_head(q.shape[2]),
        )

    def _with_cache(
        self, q: Array, k: Array, v: Array, queries: Places, keys: Places
    ) -> Array:
        mask = visible(queries, keys, None)[:, None]
        return masked_attention(q, k, v, mask & self._listed(q, queries, keys))

    def _listed(self, q: Array, queries: Places, keys: Places) -> Bool[Array, "..."]:
        """[B, h, S, T], whether the block of a query lists that of a key."""
        layout = self.config.layout(self.heads, keys.positions.shape[1])
        if layout.strides[0] == 0:  # one layout for all heads
            mine = jnp.asarray(layout[:1])
        else:
            first = tensor.first_head(q.shape[2])
            mine = lax.dynamic_slice_in_dim(jnp.asarray(layout), first, q.shape[2])
        rows, columns = (
            each.positions // self.config.block for each in (queries, keys)
        )
        return mine[:, rows[:, :, None], columns[:, None, :]].swapaxes(0, 1)


def windows(config: SparseConfig, num_layers: int) -> list[int] | None:
    """What `SparseAttention` takes as the window of each layer."""
    if config.layers is None:
        return None
    return [LISTED if i in config.layers else FULL_WINDOW for i in range(num_layers)]
