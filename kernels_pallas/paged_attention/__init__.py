"""Attention to keys and values in pages, for serving."""

from kernels_pallas.paged_attention.api import paged_attention, write_pages
from kernels_pallas.paged_attention.inputs import pages_shape

__all__ = ["paged_attention", "pages_shape", "write_pages"]
