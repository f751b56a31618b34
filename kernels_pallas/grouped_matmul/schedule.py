"""Which tile of rows meets which group, in which order.

Rows are sorted by group, so the tiles that hold rows of a group are neighbours, and
only a tile on the border of two groups is visited more than once: tiles + groups steps
are always enough (MegaBlocks, Gale et al., 2023, has the same for padded groups).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """The visits, all int32.

    Attributes:
        group: the group of each step; G stands for the rows after the last group.
        tile: the tile of rows of each step.
        start, end: the first row of each group, and the one after its last.
        count: [1], how many steps there are. Those after repeat the last one.
    """

    group: Int[Array, " S"]
    tile: Int[Array, " S"]
    start: Int[Array, " G+1"]
    end: Int[Array, " G+1"]
    count: Int[Array, "1"]


def of_outputs(sizes: Int[Array, " G"], rows: int, tile: int) -> Steps:
    """Visits that cover every row once: those of groups, and those of none.

    Args:
        sizes: rows of each group, in order; those beyond `rows` are left out.
        rows: rows in all.
        tile: rows of a tile.
    """
    start, end = _bounds(sizes, rows)
    start = jnp.concatenate([start, end[-1:]])
    end = jnp.concatenate([end, jnp.full_like(end[:1], rows)])
    return _visits(start, end, rows, tile, visit_empty=False)


def of_groups(sizes: Int[Array, " G"], rows: int, tile: int) -> Steps:
    """Visits that cover every group, an empty one with a visit of its own."""
    start, end = _bounds(sizes, rows)
    return _visits(start, end, rows, tile, visit_empty=True)


def step_bound(rows: int, tile: int, groups: int) -> int:
    """Steps that are enough for any sizes."""
    return -(-rows // tile) + groups


def _bounds(sizes: Array, rows: int) -> tuple[Array, Array]:
    end = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]]), end


def _visits(
    start: Array, end: Array, rows: int, tile: int, *, visit_empty: bool
) -> Steps:
    first = jnp.minimum(start, rows - 1) // tile
    last = jnp.maximum(end - 1, start) // tile
    visits = jnp.where(end > start, last - first + 1, int(visit_empty))
    total = jnp.cumsum(visits, dtype=jnp.int32)
    groups = start.shape[0] if visit_empty else start.shape[0] - 1
    step = jnp.arange(step_bound(rows, tile, groups), dtype=jnp.int32)
    step = jnp.minimum(step, total[-1] - 1)
    group = jnp.searchsorted(total, step, side="right").astype(jnp.int32)
    place = step - (total - visits)[group]
    return Steps(group, first[group] + place, start, end, total[-1:])
