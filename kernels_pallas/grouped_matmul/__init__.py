"""Matrix products of sorted groups of rows, each with a matrix of its own (experts)."""

from kernels_pallas.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
