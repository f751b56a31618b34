"""How queries and keys are cut into blocks."""

import dataclasses

import jax.numpy as jnp

from kernels_pallas.paged_attention.inputs import Inputs

CHUNK_BYTES = 2**20
"""Of keys and values that are fetched at a time, into one of two buffers."""
CHUNK_TOKENS = 512
ROWS = 2048
"""Queries times heads of a block: what their softmax keeps is then 3 MiB."""
LEAST_QUERIES, MOST_QUERIES = 16, 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of blocks.

    Attributes:
        queries: tokens of a block of queries.
        pages: of a block of keys.
        page: tokens of a page.
    """

    queries: int
    pages: int
    page: int

    @property
    def keys(self) -> int:
        """Tokens of a block of keys."""
        return self.pages * self.page


def blocks(inputs: Inputs) -> Blocks:
    """Queries for about one sequence, keys for a transfer that outweighs its start."""
    tokens, heads, head_dim = inputs.q.shape
    sequences, slots = inputs.table.shape
    queries = LEAST_QUERIES
    mean = tokens / sequences
    while queries < min(mean, MOST_QUERIES) and 2 * queries * heads <= ROWS:
        queries *= 2
    itemsize = jnp.dtype(inputs.pages.dtype).itemsize
    page_bytes = 2 * inputs.groups * inputs.page * head_dim * itemsize
    pages = min(CHUNK_BYTES // page_bytes, CHUNK_TOKENS // inputs.page, slots)
    return Blocks(min(queries, tokens), max(pages, 1), inputs.page)
