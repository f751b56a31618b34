"""Block-sparse attention with a layout per head, exact to the token."""

from kernels_pallas.block_sparse_attention.api import (
    block_sparse_attention,
    block_sparse_attention_with_lse,
)
from kernels_pallas.block_sparse_attention.layouts import (
    LAYOUTS,
    BigBirdLayout,
    BSLongformerLayout,
    DenseLayout,
    FixedLayout,
    Layout,
    LocalSlidingWindowLayout,
    VariableLayout,
)
from kernels_pallas.block_sparse_attention.work import Work, scheduled_fraction

__all__ = [
    "LAYOUTS",
    "BSLongformerLayout",
    "BigBirdLayout",
    "DenseLayout",
    "FixedLayout",
    "Layout",
    "LocalSlidingWindowLayout",
    "VariableLayout",
    "Work",
    "block_sparse_attention",
    "block_sparse_attention_with_lse",
    "scheduled_fraction",
]
